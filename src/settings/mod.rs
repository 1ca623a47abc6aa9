//! Settings: reads layers of text into typed values, and reports all problems in one run.
//!
//! `config/default.toml` is the only list of keys and defaults. Reading settings opens no socket, and no
//! file except the settings file.

mod check;
mod layers;
mod log_filter;
mod value;

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use figment::value::Value;
use http::{HeaderValue, Method};
use tracing_subscriber::filter::Targets;

pub use self::layers::Flags;
use self::layers::{DEFAULT, Layers};
use self::value::{Offset, OrOff, Setting};
use crate::auth::credentials::Configured;
use crate::auth::token::Validity;
use crate::environment::Environment;
use crate::layer::normalise::ErrorFormat;
use crate::layer::retry;
use crate::request::replay_body;
use crate::sandbox;
use crate::tasks::place::StateUrl;
use crate::telemetry;
use crate::upstream::{EgressProxy, Origin, Timeouts};

/// All settings. `config/default.toml` documents their keys and units.
#[derive(Debug)]
pub struct Settings {
    /// Sockets for clients, from `listen.*`.
    pub listen: ListenSettings,
    /// The admin listener, from `admin.*`.
    pub admin: Admin,
    /// The API and the connections to it, from `upstream.*`.
    pub upstream: UpstreamSettings,
    /// Places of the credential, from `credentials.*`.
    pub credentials: Configured,
    /// Times of the tokens for upstream, from `token.*`.
    pub token: Validity,
    /// Accepted clients and requests, from `access.*`.
    pub access: AccessSettings,
    /// Limits of connections and requests, from `limits.*`.
    pub limits: LimitSettings,
    /// Limits of retries (`retry.attempts`, `retry.total_time`).
    pub retry: retry::RetryLimits,
    /// Limits of request bodies that are kept for a retry (`retry.replay_*`).
    pub replay: replay_body::ReplayLimits,
    /// Format of error responses, from `errors.*`.
    pub errors: ErrorFormat,
    /// Behaviour of the embedded sandbox, from `sandbox.*`.
    pub sandbox: sandbox::Options,
    /// Store of tasks, from `state.*`.
    pub state: StateSettings,
    /// Time limits of a shutdown, from `shutdown.*`.
    pub shutdown: Shutdown,
    /// Format and choice of log lines, from `log.*`.
    pub log: Log,
}

/// The settings that a reload applies to a running proxy. All others take effect at the next start.
///
/// The reload takes this struct apart field by field, so the compiler reports a field that it leaves out.
#[derive(Clone, Copy, Debug)]
pub struct LiveSettings<'a> {
    pub credentials: &'a Configured,
    pub token: Validity,
    pub access: &'a AccessSettings,
    /// Largest request body, in bytes (`limits.request_body`).
    pub request_body: ByteSize,
    /// Most requests in flight at once (`limits.in_flight`).
    pub in_flight: u64,
    /// Limits of retries (`retry.attempts`, `retry.total_time`).
    pub retry: retry::RetryLimits,
    /// Limits of request bodies that are kept for a retry (`retry.replay_*`).
    pub replay: replay_body::ReplayLimits,
    pub errors: ErrorFormat,
    /// Levels and targets of the lines to log (`log.filter`).
    pub filter: &'a Targets,
}

/// Sockets that clients connect to (`listen.*`).
#[derive(Debug)]
pub struct ListenSettings {
    /// TCP addresses to listen on. May be empty if there is a Unix socket.
    pub addresses: Vec<SocketAddr>,
    /// Path of a Unix socket to listen on as well; `None` for no Unix socket.
    pub unix_socket: Option<PathBuf>,
    /// Certificate for HTTPS (`listen.tls.certificate_file`); `None` for plain HTTP.
    pub certificate_file: Option<PathBuf>,
    /// Private key of that certificate (`listen.tls.key_file`).
    pub key_file: Option<PathBuf>,
    /// True if other machines may connect although clients need no token.
    pub unsafe_allow_remote: bool,
}

/// The admin listener, for health and metrics (`admin.*`).
#[derive(Debug)]
pub struct Admin {
    /// Address to listen on; `None` for no admin listener.
    pub address: Option<SocketAddr>,
    /// True if `POST /quit` ends the proxy.
    pub quit: bool,
}

/// The API, and the connections to it (`upstream.*`).
#[derive(Debug)]
pub struct UpstreamSettings {
    /// Origin of the API (`upstream.url`).
    pub origin: Origin,
    /// File with a further trust root, for a network that inspects TLS.
    pub ca_file: Option<PathBuf>,
    /// HTTP proxy that is the only way out of this network; `None` to connect directly.
    pub proxy: Option<EgressProxy>,
    pub timeouts: Timeouts,
    pub warmth: WarmUp,
}

/// Connections that are opened ahead, so that requests need not wait for one.
#[derive(Clone, Copy, Debug)]
pub struct WarmUp {
    /// True to send one request to upstream at start (`upstream.warm_up`).
    pub probe: bool,
    /// Time after the last request during which one connection is kept ready (`upstream.keep_warm`); zero to
    /// keep none.
    pub keep: Duration,
}

/// Clients and requests that the proxy accepts (`access.*`).
#[derive(Debug)]
pub struct AccessSettings {
    /// Accepted values of the `Host` header, without port.
    pub allowed_hosts: Vec<String>,
    /// Web origins whose pages may send requests.
    pub allowed_origins: Vec<HeaderValue>,
    /// Methods that are forwarded; all if empty.
    pub allowed_methods: Vec<Method>,
    /// Path prefixes that are forwarded; all if empty.
    pub allowed_paths: Vec<String>,
    /// File of client tokens; `None` if clients need no token.
    pub client_tokens_file: Option<PathBuf>,
}

/// Limits of connections and requests (`limits.*`).
#[derive(Debug)]
pub struct LimitSettings {
    /// Largest request body, in bytes.
    pub request_body: ByteSize,
    /// Most client connections open at once. New ones wait.
    pub connections: u64,
    /// Longest time to receive the head of a request.
    pub header_timeout: Duration,
    /// Most requests in flight at once.
    pub in_flight: u64,
}

/// The store of tasks (`state.*`).
#[derive(Debug)]
pub struct StateSettings {
    /// Place of the store: a file, or the memory of the process.
    pub url: StateUrl,
    /// Time for which a task is kept after its end.
    pub keep: Duration,
    /// Most requests that wait at once.
    pub waiting: u64,
    /// True to ask Kling for running tasks that no client asks for.
    pub watch: bool,
}

/// Time limits of an orderly shutdown (`shutdown.*`).
#[derive(Debug)]
pub struct Shutdown {
    /// Time to keep serving, as not ready, after the request to stop.
    pub delay: Duration,
    /// Time after that for the requests in flight to complete.
    pub drain: Duration,
}

/// Format and choice of log lines (`log.*`).
#[derive(Debug)]
pub struct Log {
    pub format: telemetry::LogFormat,
    /// Levels and targets of the lines to log.
    pub filter: Targets,
}

/// A problem with settings that the user has to correct. It never shows the value of a secret.
#[derive(Debug, PartialEq, Eq)]
pub struct SettingProblem {
    /// Key, file or variable to correct.
    place: String,
    reason: String,
}

/// One setting as `kling-proxy settings` shows it.
#[derive(Debug, PartialEq, Eq)]
pub struct SettingRow {
    /// Key with dots, such as `listen.address`.
    pub key: String,
    /// Value in TOML, redacted if it is or may hold a secret.
    pub value: String,
    /// Source of the value: `default`, or the name of a file, a variable or a flag.
    pub source: String,
    /// True if a reload applies the setting. Otherwise it takes effect at the next start.
    pub is_live: bool,
}

/// Keys whose value is never shown.
const SECRETS: [&str; 2] = ["credentials.access_key", "credentials.secret_key"];

/// Keys whose value is not shown if it may hold a password: if it contains `@` or `?`.
const URLS: [&str; 2] = ["upstream.url", "upstream.proxy"];

/// Text that is shown instead of a secret.
const REDACTED: &str = "[redacted]";

// === impl Settings ===

impl Settings {
    /// Reads and checks all settings.
    ///
    /// # Errors
    ///
    /// Returns every [`SettingProblem`], so that one run is enough to correct them all.
    pub fn load(
        flags: &Flags,
        environment: &Environment,
    ) -> Result<(Self, Vec<SettingRow>), Vec<SettingProblem>> {
        let mut problems = Vec::new();
        let layers = Layers::read(flags, environment, &mut problems);
        let mut reader = Reader {
            layers: &layers,
            problems: &mut problems,
            live: Vec::new(),
        };
        let settings = Self::read(&mut reader);
        let live = reader.live;
        problems.extend(settings.problems());
        if problems.is_empty() {
            Ok((settings, rows(&layers, &live)))
        } else {
            Err(problems)
        }
    }

    /// Reads all keys: with [`Reader::live`] those that a reload applies, with [`Reader::get`] the others.
    fn read(from: &mut Reader<'_>) -> Self {
        Self {
            listen: ListenSettings {
                addresses: from.get("listen.address"),
                unix_socket: from.get("listen.unix_socket"),
                certificate_file: from.get("listen.tls.certificate_file"),
                key_file: from.get("listen.tls.key_file"),
                unsafe_allow_remote: from.get("listen.unsafe_allow_remote"),
            },
            admin: Admin {
                address: from.get::<OrOff>("admin.address").0,
                quit: from.get("admin.quit"),
            },
            upstream: UpstreamSettings {
                origin: from.get("upstream.url"),
                ca_file: from.get("upstream.ca_file"),
                proxy: from.get("upstream.proxy"),
                timeouts: Timeouts {
                    connect: from.get("upstream.connect_timeout"),
                    response: from.get("upstream.response_timeout"),
                    idle: from.get("upstream.idle_timeout"),
                },
                warmth: WarmUp {
                    probe: from.get("upstream.warm_up"),
                    keep: from.get("upstream.keep_warm"),
                },
            },
            credentials: Configured {
                access_key: from.live("credentials.access_key"),
                secret_key: from.live("credentials.secret_key"),
                access_key_file: from.live("credentials.access_key_file"),
                secret_key_file: from.live("credentials.secret_key_file"),
                api_key_file: from.live("credentials.api_key_file"),
                command: from.live("credentials.command"),
            },
            token: Validity {
                lifetime: from.live("token.lifetime"),
                not_before_leeway: from.live("token.not_before_leeway"),
                refresh_before: from.live("token.refresh_before"),
            },
            access: AccessSettings {
                allowed_hosts: from.live("access.allowed_hosts"),
                allowed_origins: from.live("access.allowed_origins"),
                allowed_methods: from.live("access.allowed_methods"),
                allowed_paths: from.live("access.allowed_paths"),
                client_tokens_file: from.live("access.client_tokens_file"),
            },
            limits: LimitSettings {
                request_body: from.live("limits.request_body"),
                connections: from.get("limits.connections"),
                header_timeout: from.get("limits.header_timeout"),
                in_flight: from.live("limits.in_flight"),
            },
            retry: retry::RetryLimits {
                attempts: from.live("retry.attempts"),
                total_time: from.live("retry.total_time"),
            },
            replay: replay_body::ReplayLimits {
                body: from.live("retry.replay_body"),
                memory: from.live("retry.replay_memory"),
            },
            errors: ErrorFormat {
                statuses: from.live("errors.status"),
                format: from.live("errors.format"),
            },
            sandbox: sandbox::Options {
                task_time: from.get("sandbox.task_time"),
                speed: from
                    .get::<u64>("sandbox.speed")
                    .try_into()
                    .unwrap_or(u32::MAX),
                latency: from.get("sandbox.latency"),
                concurrency: from
                    .get::<u64>("sandbox.concurrency")
                    .try_into()
                    .unwrap_or(usize::MAX),
                foreign: from
                    .get::<u64>("sandbox.foreign")
                    .try_into()
                    .unwrap_or(u32::MAX),
                results: from.get("sandbox.results"),
                clock_offset: from.get::<Offset>("sandbox.clock_offset").0,
                seed: from.get("sandbox.seed"),
                public_url: from.get("sandbox.public_url"),
            },
            state: StateSettings {
                url: from.get("state.url"),
                keep: from.get("state.keep"),
                waiting: from.get("state.waiting"),
                watch: from.get("state.watch"),
            },
            shutdown: Shutdown {
                delay: from.get("shutdown.delay"),
                drain: from.get("shutdown.drain"),
            },
            log: Log {
                format: from.get("log.format"),
                filter: from.live("log.filter"),
            },
        }
    }

    /// Returns the settings that a reload applies to a running proxy.
    pub fn live(&self) -> LiveSettings<'_> {
        LiveSettings {
            credentials: &self.credentials,
            token: self.token,
            access: &self.access,
            request_body: self.limits.request_body,
            in_flight: self.limits.in_flight,
            retry: self.retry,
            replay: self.replay,
            errors: self.errors,
            filter: &self.log.filter,
        }
    }
}

/// Reads keys one by one, and collects the problems.
struct Reader<'a> {
    layers: &'a Layers,
    problems: &'a mut Vec<SettingProblem>,
    /// Keys that were read for [`LiveSettings`].
    live: Vec<&'static str>,
}

// === impl Reader ===

impl Reader<'_> {
    /// Reads the value of a key of [`LiveSettings`].
    fn live<T: Setting>(&mut self, key: &'static str) -> T {
        self.live.push(key);
        self.get(key)
    }

    /// Reads the value of a key. If the value is wrong, notes the problem and returns the default, so that
    /// reading goes on.
    fn get<T: Setting>(&mut self, key: &str) -> T {
        if let Some((value, source)) = self.layers.find(key) {
            match T::read(&value) {
                Ok(value) => return value,
                Err(reason) => {
                    let want = reason.unwrap_or_else(|| format!("want {}", T::want()));
                    let got = shown(key, &value);
                    let reason = format!("{want}; got {got} from {source}");
                    self.problems.push(SettingProblem::new(key, reason));
                }
            }
        }
        let default = self
            .layers
            .default(key)
            .and_then(|value| T::read(&value).ok());
        #[expect(
            clippy::expect_used,
            reason = "config/default.toml is a constant with a test"
        )]
        default.expect("every key has a default in config/default.toml")
    }
}

// === impl SettingRow ===

impl SettingRow {
    /// Returns true if the value is redacted.
    pub fn is_secret(&self) -> bool {
        self.value == REDACTED
    }

    /// Returns true if no file, variable or flag sets the key.
    pub fn is_default(&self) -> bool {
        self.source == DEFAULT
    }
}

// === impl SettingProblem ===

impl SettingProblem {
    /// Creates a problem with the key, file or variable `place`.
    pub fn new(place: impl fmt::Display, reason: impl Into<String>) -> Self {
        Self {
            place: place.to_string(),
            reason: reason.into(),
        }
    }
}

impl fmt::Display for SettingProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`: {}", self.place, self.reason)
    }
}

fn rows(layers: &Layers, live: &[&str]) -> Vec<SettingRow> {
    let row = |key: &String| {
        let (value, source) = layers.find(key)?;
        Some(SettingRow {
            key: key.clone(),
            value: shown(key, &value),
            source,
            is_live: live.contains(&key.as_str()),
        })
    };
    layers.keys.iter().filter_map(row).collect()
}

/// Formats a value as TOML, or redacts it if it is or may hold a secret.
fn shown(key: &str, value: &Value) -> String {
    let shown = serde_json::to_string(value).unwrap_or_default();
    let secret = SECRETS.contains(&key) && value.as_str() != Some("");
    let password = URLS.contains(&key) && shown.contains(['@', '?']);
    if secret || password {
        REDACTED.to_owned()
    } else {
        shown
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::auth::secret::Secret;

    fn load(variables: &[(&str, &str)]) -> Result<(Settings, Vec<SettingRow>), Vec<String>> {
        Settings::load(&Flags::default(), &variables.iter().copied().collect())
            .map_err(|problems| problems.iter().map(SettingProblem::to_string).collect())
    }

    #[test]
    fn the_defaults_are_without_problems() {
        let (settings, rows) = load(&[]).unwrap();
        assert_eq!(
            settings.listen.addresses,
            ["127.0.0.1:5546".parse().unwrap()]
        );
        assert!(rows.iter().all(SettingRow::is_default), "{rows:?}");
    }

    #[test]
    fn a_setting_is_called_live_if_and_only_if_a_reload_applies_it() {
        let variable = |key: &str| format!("KLING_PROXY_{}", key.to_uppercase().replace('.', "__"));
        let live = |key: &str, value: &str| {
            // A certificate needs its key, and a key needs its certificate.
            let mut variables = vec![(variable(key), value)];
            if let Some(file) = key.strip_prefix("listen.tls.") {
                let other = match file {
                    "key_file" => "certificate_file",
                    _ => "key_file",
                };
                variables.push((variable(&format!("listen.tls.{other}")), value));
            }
            let variables: Vec<_> = variables
                .iter()
                .map(|(name, value)| (&**name, *value))
                .collect();
            format!("{:?}", load(&variables).unwrap().0.live())
        };
        let (settings, rows) = load(&[]).unwrap();
        let before = format!("{:?}", settings.live());
        let others = BTreeMap::from([
            ("listen.address", "127.0.0.1:1"),
            ("listen.unix_socket", "/x"),
            ("listen.unsafe_allow_remote", "true"),
            ("listen.tls.certificate_file", "/x"),
            ("listen.tls.key_file", "/x"),
            ("admin.address", "off"),
            ("admin.quit", "true"),
            ("state.url", "memory"),
            ("state.keep", "1d"),
            ("state.waiting", "7"),
            ("state.watch", "false"),
            ("upstream.url", "https://kling.test"),
            ("upstream.ca_file", "/x"),
            ("upstream.proxy", "http://egress.test:3128"),
            ("upstream.connect_timeout", "1s"),
            ("upstream.response_timeout", "1s"),
            ("upstream.idle_timeout", "1s"),
            ("upstream.warm_up", "false"),
            ("upstream.keep_warm", "1s"),
            ("credentials.access_key", "x"),
            ("credentials.secret_key", "x"),
            ("credentials.access_key_file", "/x"),
            ("credentials.secret_key_file", "/x"),
            ("credentials.api_key_file", "/x"),
            ("credentials.command", "x"),
            ("token.lifetime", "20m"),
            ("token.not_before_leeway", "1s"),
            ("token.refresh_before", "1m"),
            ("access.allowed_hosts", "kling.test"),
            ("access.allowed_origins", "http://kling.test"),
            ("access.allowed_methods", "GET"),
            ("access.allowed_paths", "/v1"),
            ("access.client_tokens_file", "/x"),
            ("limits.request_body", "1MiB"),
            ("limits.connections", "1"),
            ("limits.header_timeout", "1s"),
            ("limits.in_flight", "1"),
            ("retry.attempts", "1"),
            ("retry.total_time", "1s"),
            ("retry.replay_body", "2MiB"),
            ("retry.replay_memory", "2MiB"),
            ("errors.status", "actionable"),
            ("errors.format", "upstream"),
            ("sandbox.task_time", "1s"),
            ("sandbox.speed", "2"),
            ("sandbox.latency", "1s"),
            ("sandbox.concurrency", "1"),
            ("sandbox.foreign", "1"),
            ("sandbox.results", "data"),
            ("sandbox.clock_offset", "1s"),
            ("sandbox.seed", "1"),
            ("sandbox.public_url", "http://kling.test"),
            ("shutdown.delay", "1s"),
            ("shutdown.drain", "1s"),
            ("log.format", "json"),
            ("log.filter", "debug"),
        ]);
        for SettingRow { key, is_live, .. } in rows {
            let value = others.get(&*key).expect("another value for each setting");
            assert_eq!(live(&key, value) != before, is_live, "{key}");
        }
    }

    #[test]
    fn a_secret_of_digits_stays_a_text() {
        let digits = "0123456789012345";
        let (settings, _) = load(&[("KLING_PROXY_CREDENTIALS__SECRET_KEY", digits)]).unwrap();
        assert_eq!(
            settings.credentials.secret_key,
            Some(Secret::from(digits.to_owned()))
        );
    }

    #[test]
    fn every_problem_is_told_at_once_without_a_secret() {
        let problems = load(&[
            ("KLING_PROXY_TOKEN__LIFETIME", "5s"),
            ("KLING_PROXY_LISTEN_ADDRESS", "127.0.0.1:1"),
            ("KLING_PROXY_CREDENTIALS__SECRET_KEY", "[\"canary\"]"),
            ("KLING_PROXY_PORT_5546_TCP", "tcp://10.0.0.1:5546"),
            ("KLING_PROXY_LOG__FORMAT", ""),
        ]);
        assert_eq!(
            problems.err().unwrap(),
            [
                "`KLING_PROXY_LISTEN_ADDRESS`: no such setting; the nearest is KLING_PROXY_LISTEN__ADDRESS",
                "`credentials.secret_key`: want a text; got [redacted] from KLING_PROXY_CREDENTIALS__SECRET_KEY",
                "`token.lifetime`: want 1m to 30m, got 5s",
                "`token.refresh_before`: want less than token.lifetime, 5s",
            ]
        );
    }
}
