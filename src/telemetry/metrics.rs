//! Every metric, its name and its labels.
//!
//! Labels come from closed sets, and children that each request uses are looked up once, so that
//! counting is an atomic addition. Counters of what goes wrong stand at 0 from the start: to
//! Prometheus, one that comes to be with its first event has not increased.

use std::sync::Arc;
use std::time::Duration;

use http::{Method, StatusCode};
use prometheus::core::Collector;
use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry,
    TextEncoder,
};

use crate::kling::service_code::{self, Class, TABLE};
use crate::telemetry;

/// Upper bounds of the duration buckets in seconds: those OpenTelemetry advises for HTTP, to 10.
const BUCKETS: [f64; 14] = [
    0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
];

/// Methods with a label of their own; the Kling API uses the first two.
const METHODS: [Method; 6] = [
    Method::GET,
    Method::POST,
    Method::HEAD,
    Method::OPTIONS,
    Method::PUT,
    Method::DELETE,
];
const OTHER_METHOD: &str = "_OTHER";
const STATUS_CLASSES: [&str; 5] = ["1xx", "2xx", "3xx", "4xx", "5xx"];

/// The registry and a handle on each metric. Clones count in the same ones: a thread that has a clone
/// shares with others what is counted, and not who holds it, which would change twice a request.
#[derive(Clone)]
pub struct Metrics {
    registry: Registry,
    requests: Vec<[IntCounter; STATUS_CLASSES.len()]>,
    duration: Histogram,
    in_flight: IntGauge,
    answers: IntCounter,
    attempts: IntCounterVec,
    refusals: IntCounterVec,
    clients: IntCounterVec,
    client_tokens_valid: IntGauge,
    withheld: IntCounterVec,
    not_kept: IntCounterVec,
    minted: IntCounterVec,
    token_expiry: IntGauge,
    clock_offset: Gauge,
    log_lines_dropped: IntCounter,
}

/// Makes metrics and registers them.
struct Registrar(Registry);

// === impl Metrics ===

impl Metrics {
    /// Registers all metrics.
    ///
    /// # Errors
    ///
    /// Only if two metrics here had one name, which every start would show.
    pub fn new() -> Result<Self, prometheus::Error> {
        let registrar = Registrar::new()?;
        registrar.version()?;
        let attempts = registrar.known(
            "upstream_attempts_total",
            "Requests sent upstream, by what came of them: response, or the error's type.",
            "outcome",
            &[
                kinds(Class::counts_as_attempt),
                vec![service_code::UNKNOWN.kind],
            ]
            .concat(),
        )?;
        let client_tokens_valid = registrar.gauge(
            "client_tokens_valid",
            "Whether the file of client tokens is right: 1, and 0 while it is wrong or holds none; 1 without one.",
        )?;
        client_tokens_valid.set(1);
        Ok(Self {
            requests: registrar.requests()?,
            duration: registrar.duration()?,
            in_flight: registrar.gauge("requests_in_flight", "Requests whose answer has not ended.")?,
            answers: attempts.with_label_values(&["response"]),
            attempts,
            refusals: registrar.known(
                "guard_refusals_total",
                "Requests refused unsent, by the error's type.",
                "reason",
                &kinds(Class::counts_as_refusal),
            )?,
            clients: registrar.counters(
                "client_requests_total",
                "Requests that showed a client token, by its name.",
                &["client"],
            )?,
            client_tokens_valid,
            withheld: registrar.known(
                "resends_withheld_total",
                "Requests that could be sent again but were not, by what was exhausted: body, budget or time.",
                "reason",
                &["body", "budget", "time"],
            )?,
            not_kept: registrar.known(
                "request_bodies_not_kept_total",
                "Request bodies that cannot be sent again, by the bound they exceeded: body or memory.",
                "reason",
                &["body", "memory"],
            )?,
            minted: registrar.known(
                "tokens_minted_total",
                "Tokens minted, by outcome: ok or error.",
                "outcome",
                &["ok", "error"],
            )?,
            token_expiry: registrar.gauge(
                "token_expiry_timestamp_seconds",
                "When the current token ends; 0 without one.",
            )?,
            clock_offset: registrar.register(Gauge::new(
                "clock_offset_seconds",
                "How far ahead of this machine's the clock is that tokens are made by: upstream's, as far as it is known.",
            )?)?,
            log_lines_dropped: registrar.register(IntCounter::new(
                "log_lines_dropped_total",
                "Log lines that were lost: standard error did not take them.",
            )?)?,
            registry: registrar.0,
        })
    }

    /// The exposition in Prometheus' text format.
    ///
    /// # Errors
    ///
    /// Only if a metric's name were invalid, which every scrape would show.
    pub fn render(&self) -> Result<String, prometheus::Error> {
        self.log_lines_dropped.reset();
        self.log_lines_dropped.inc_by(telemetry::lines_dropped());
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// Counts a request in; dropping the guard counts it out.
    pub fn enter(self: &Arc<Self>) -> InFlight {
        self.in_flight.inc();
        InFlight {
            metrics: Arc::clone(self),
            is_counted: true,
        }
    }

    /// Makes the guard of a request that does not count, such as one to the admin listener.
    pub fn enter_uncounted(self: &Arc<Self>) -> InFlight {
        InFlight {
            metrics: Arc::clone(self),
            is_counted: false,
        }
    }

    /// How many requests are in flight.
    pub fn in_flight(&self) -> u64 {
        u64::try_from(self.in_flight.get()).unwrap_or_default()
    }

    /// A request was answered.
    pub fn answered(&self, method: &Method, status: StatusCode, after: Duration) {
        let known = METHODS.iter().position(|known| known == method);
        let row = known.unwrap_or(METHODS.len());
        let class = usize::from(status.as_u16() / 100).saturating_sub(1);
        if let Some(counter) = self.requests.get(row).and_then(|row| row.get(class)) {
            counter.inc();
        }
        self.duration.observe(after.as_secs_f64());
    }

    /// Upstream was asked: with success, or with this type of error.
    pub fn attempted(&self, error: Option<&'static str>) {
        match error {
            None => self.answers.inc(),
            Some(kind) => self.attempts.with_label_values(&[kind]).inc(),
        }
    }

    /// The guard refused a request with this type of error.
    pub fn refused(&self, kind: &'static str) {
        self.refusals.with_label_values(&[kind]).inc();
    }

    /// A client showed the token of this name.
    pub fn admitted(&self, client: &str) {
        self.clients.with_label_values(&[client]).inc();
    }

    /// The file of client tokens was read.
    pub fn client_tokens_valid(&self, valid: bool) {
        self.client_tokens_valid.set(valid.into());
    }

    /// A request could have been sent again, but for this.
    pub fn resend_withheld(&self, reason: &'static str) {
        self.withheld.with_label_values(&[reason]).inc();
    }

    /// A request body is not kept to be sent again, because of this bound.
    pub fn body_not_kept(&self, bound: &'static str) {
        self.not_kept.with_label_values(&[bound]).inc();
    }

    /// A token was to be minted.
    pub fn token_minted(&self, minted: bool) {
        let outcome = if minted { "ok" } else { "error" };
        self.minted.with_label_values(&[outcome]).inc();
    }

    /// The current token ends at this second since the epoch.
    pub fn token_expires(&self, exp: u64) {
        self.token_expiry
            .set(i64::try_from(exp).unwrap_or(i64::MAX));
    }

    /// Upstream's clock is this far ahead of this machine's, in seconds.
    pub fn clock_offset(&self, seconds: f64) {
        self.clock_offset.set(seconds);
    }
}

// === impl Registrar ===

impl Registrar {
    fn new() -> Result<Self, prometheus::Error> {
        Registry::new_custom(Some("kling_proxy".to_owned()), None).map(Self)
    }

    fn register<C: Collector + Clone + 'static>(&self, metric: C) -> Result<C, prometheus::Error> {
        self.0.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, prometheus::Error> {
        self.register(IntGauge::new(name, help)?)
    }

    fn counters(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<IntCounterVec, prometheus::Error> {
        self.register(IntCounterVec::new(Opts::new(name, help), labels)?)
    }

    /// Registers counters by one label whose values are known. All of them stand at 0 from the start.
    fn known(
        &self,
        name: &str,
        help: &str,
        label: &str,
        values: &[&str],
    ) -> Result<IntCounterVec, prometheus::Error> {
        let counters = self.counters(name, help, &[label])?;
        for value in values {
            counters.with_label_values(&[value]);
        }
        Ok(counters)
    }

    /// Registers the requests answered: a row for each method, a column for each class of statuses.
    fn requests(&self) -> Result<Vec<[IntCounter; STATUS_CLASSES.len()]>, prometheus::Error> {
        let labels = ["method", "status_class"];
        let requests = self.counters("requests_total", "Requests answered.", &labels)?;
        let methods = METHODS.iter().map(Method::as_str).chain([OTHER_METHOD]);
        let row = |method| STATUS_CLASSES.map(|class| requests.with_label_values(&[method, class]));
        Ok(methods.map(row).collect())
    }

    fn duration(&self) -> Result<Histogram, prometheus::Error> {
        let options = HistogramOpts::new(
            "request_duration_seconds",
            "From the head of a request to the head of its answer.",
        );
        self.register(Histogram::with_opts(options.buckets(BUCKETS.to_vec()))?)
    }

    /// Registers the version as a label of a gauge that is always 1.
    fn version(&self) -> Result<(), prometheus::Error> {
        let build = Opts::new("build_info", "The running version.");
        let build = IntGauge::with_opts(build.const_label("version", env!("CARGO_PKG_VERSION")))?;
        build.set(1);
        self.register(build).map(drop)
    }
}

/// Returns the types of errors whose class is counted.
fn kinds(counted: fn(Class) -> bool) -> Vec<&'static str> {
    let rows = TABLE.iter().filter(|row| counted(row.class));
    rows.map(|row| row.kind).collect()
}

/// The method as a label or a field: one of a closed set.
pub fn method_label(method: &Method) -> &str {
    if METHODS.contains(method) {
        method.as_str()
    } else {
        OTHER_METHOD
    }
}

/// Counts one request as in flight until it is dropped.
pub struct InFlight {
    metrics: Arc<Metrics>,
    is_counted: bool,
}

// === impl InFlight ===

impl InFlight {
    /// Where it is counted.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if self.is_counted {
            self.metrics.in_flight.dec();
        }
    }
}
