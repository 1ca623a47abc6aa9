//! All metrics, with their names and labels.
//!
//! Label values come from closed sets. Counters that each request uses are looked up once, so that
//! counting is an atomic addition. Error counters start at 0: Prometheus sees no increase in a counter
//! that only appears with its first event.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use http::{Method, StatusCode};
use prometheus::core::Collector;
use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts,
    Registry, TextEncoder,
};

use crate::kling::service_code::{self, Class, TABLE};
use crate::telemetry;

/// Upper bounds of the duration buckets, in seconds: those that OpenTelemetry advises for HTTP, up to
/// 10.
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

/// The registry, and a handle to each metric. All clones count in the same metrics. Each thread has its
/// own clone, so that threads share only the counters, and not a reference count that would change twice
/// per request.
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
    waiting: IntGauge,
    pack_units_left: GaugeVec,
    pack_end: GaugeVec,
    state_up: IntGauge,
}

/// Makes metrics and registers them.
struct Registrar(Registry);

// === impl Metrics ===

impl Metrics {
    /// Registers all metrics.
    ///
    /// # Errors
    ///
    /// Fails only if two metrics here had the same name, which every start would show.
    pub fn new() -> Result<Self, prometheus::Error> {
        let registrar = Registrar::new()?;
        registrar.version()?;
        let attempts = registrar.known(
            "upstream_attempts_total",
            "Requests sent upstream, by outcome: response, or the error's type.",
            "outcome",
            &[
                kinds(Class::counts_as_attempt),
                vec![service_code::UNKNOWN.kind],
            ]
            .concat(),
        )?;
        let client_tokens_valid = registrar.gauge(
            "client_tokens_valid",
            "1 if the file of client tokens is valid, or none is set; 0 if it is wrong or empty.",
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
                "Requests that the guard refused before anything was sent, by the error's type.",
                "reason",
                &kinds(Class::counts_as_refusal),
            )?,
            clients: registrar.counters(
                "client_requests_total",
                "Requests that sent a client token, by its name.",
                &["client"],
            )?,
            client_tokens_valid,
            withheld: registrar.known(
                "resends_withheld_total",
                "Retries that were allowed but not made, by reason: body, budget or time.",
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
                "Offset of the clock that tokens use from this machine's clock; positive if ahead.",
            )?)?,
            log_lines_dropped: registrar.register(IntCounter::new(
                "log_lines_dropped_total",
                "Log lines that were lost because standard error did not accept them.",
            )?)?,
            waiting: registrar.gauge(
                "requests_waiting",
                "Requests that wait for the end of a task, or for events.",
            )?,
            pack_units_left: registrar.gauges(
                "pack_units_left",
                "Units left in each online resource pack, as Kling tells.",
                &["account", "pack"],
            )?,
            pack_end: registrar.gauges(
                "pack_end_timestamp_seconds",
                "When each online resource pack ends.",
                &["account", "pack"],
            )?,
            state_up: registrar.gauge(
                "state_up",
                "1 while the store of tasks takes writes, else 0.",
            )?,
            registry: registrar.0,
        })
    }

    /// Returns all metrics in Prometheus' text format.
    ///
    /// # Errors
    ///
    /// Fails only if a metric had an invalid name, which every scrape would show.
    pub fn render(&self) -> Result<String, prometheus::Error> {
        self.log_lines_dropped.reset();
        self.log_lines_dropped.inc_by(telemetry::lines_dropped());
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// Counts a request as in flight until the returned guard is dropped.
    pub fn enter(self: &Arc<Self>) -> InFlight {
        self.in_flight.inc();
        InFlight {
            metrics: Arc::clone(self),
            is_counted: AtomicBool::new(true),
        }
    }

    /// Makes a guard for a request that is not counted, such as one to the admin listener.
    pub fn enter_uncounted(self: &Arc<Self>) -> InFlight {
        InFlight {
            metrics: Arc::clone(self),
            is_counted: AtomicBool::new(false),
        }
    }

    /// Returns the number of requests in flight.
    pub fn in_flight(&self) -> u64 {
        u64::try_from(self.in_flight.get()).unwrap_or_default()
    }

    /// Counts a response, and records the time from the head of the request to the head of the response.
    pub fn answered(&self, method: &Method, status: StatusCode, after: Duration) {
        let known = METHODS.iter().position(|known| known == method);
        let row = known.unwrap_or(METHODS.len());
        let class = usize::from(status.as_u16() / 100).saturating_sub(1);
        if let Some(counter) = self.requests.get(row).and_then(|row| row.get(class)) {
            counter.inc();
        }
        self.duration.observe(after.as_secs_f64());
    }

    /// Counts an attempt to send a request upstream: successful, or with this type of error.
    pub fn attempted(&self, error: Option<&'static str>) {
        match error {
            None => self.answers.inc(),
            Some(kind) => self.attempts.with_label_values(&[kind]).inc(),
        }
    }

    /// Counts a request that the guard refused with this type of error.
    pub fn refused(&self, kind: &'static str) {
        self.refusals.with_label_values(&[kind]).inc();
    }

    /// Counts a request with the client token of this name.
    pub fn admitted(&self, client: &str) {
        self.clients.with_label_values(&[client]).inc();
    }

    /// Records whether the file of client tokens is valid.
    pub fn client_tokens_valid(&self, valid: bool) {
        self.client_tokens_valid.set(valid.into());
    }

    /// Counts a retry that was allowed but not made, for this reason.
    pub fn resend_withheld(&self, reason: &'static str) {
        self.withheld.with_label_values(&[reason]).inc();
    }

    /// Counts a request body that is not kept for a retry, because it exceeds this bound.
    pub fn body_not_kept(&self, bound: &'static str) {
        self.not_kept.with_label_values(&[bound]).inc();
    }

    /// Counts a token that was minted, or could not be.
    pub fn token_minted(&self, minted: bool) {
        let outcome = if minted { "ok" } else { "error" };
        self.minted.with_label_values(&[outcome]).inc();
    }

    /// Records the end of the current token, in seconds since the epoch.
    pub fn token_expires(&self, exp: u64) {
        self.token_expiry
            .set(i64::try_from(exp).unwrap_or(i64::MAX));
    }

    /// Counts one request more that waits, or one less.
    pub fn waits(&self, waits: bool) {
        if waits {
            self.waiting.inc();
        } else {
            self.waiting.dec();
        }
    }

    /// Records the online resource packs of an account: name, units left, and the end in milliseconds since
    /// 1970. Packs that are not among them have no metric any more.
    pub fn packs<'a>(&self, account: &str, packs: impl Iterator<Item = (&'a str, f64, i64)>) {
        self.pack_units_left.reset();
        self.pack_end.reset();
        for (pack, left, end) in packs {
            let labels = [account, pack];
            self.pack_units_left.with_label_values(&labels).set(left);
            #[expect(clippy::cast_precision_loss, reason = "exact for many thousand years")]
            let end = (end / 1000) as f64;
            self.pack_end.with_label_values(&labels).set(end);
        }
    }

    /// Records if the store of tasks takes writes.
    pub fn state_up(&self, is_up: bool) {
        self.state_up.set(i64::from(is_up));
    }

    /// Records the offset of upstream's clock from this machine's clock, in seconds; positive if ahead.
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

    fn gauges(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<GaugeVec, prometheus::Error> {
        self.register(GaugeVec::new(Opts::new(name, help), labels)?)
    }

    fn counters(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<IntCounterVec, prometheus::Error> {
        self.register(IntCounterVec::new(Opts::new(name, help), labels)?)
    }

    /// Registers counters by one label whose values are known. All of them start at 0.
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

/// Returns the method as a label or a field: one of a closed set.
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
    is_counted: AtomicBool,
}

// === impl InFlight ===

impl InFlight {
    /// Returns the metrics that count the request.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Counts the request as in flight no longer.
    pub fn leave(&self) {
        if self.is_counted.swap(false, Relaxed) {
            self.metrics.in_flight.dec();
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.leave();
    }
}
