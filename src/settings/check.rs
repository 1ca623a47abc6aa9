//! Checks of settings beyond the form of each value: ranges, and values that do not go together.

use std::net::SocketAddr;
use std::time::Duration;

use super::{AccessSettings, ListenSettings, SettingProblem, Settings};
use crate::auth::token::Validity;
use crate::layer::guard::rules::{is_host, is_web_origin};
use crate::layer::normalise::{ErrorBodyFormat, StatusMapping};

/// Allowed lifetimes of a token. Kling documents 30 minutes ("General Information", read 2026-11-22); less
/// than a minute is of no use.
const LIFETIMES: std::ops::RangeInclusive<Duration> =
    Duration::from_mins(1)..=Duration::from_mins(30);

/// Allowed numbers of attempts for one request. More would be an attack on upstream.
const ATTEMPTS: std::ops::RangeInclusive<u64> = 1..=10;

/// Allowed speeds of the sandbox. At the highest, a task of 24 h takes less than a second.
const SPEEDS: std::ops::RangeInclusive<u32> = 1..=100_000;

/// Most foreign tasks of the sandbox in each pack. No pack has so many slots.
const MOST_FOREIGN: u32 = 1000;

/// Longest duration. A longer one is a mistake, and a very long one would overflow a deadline.
const LONGEST_WAIT: Duration = Duration::from_hours(24);

// === impl Settings ===

impl Settings {
    /// Finds problems in settings whose values are all well formed.
    pub(super) fn problems(&self) -> Vec<SettingProblem> {
        let addresses = self.listen.addresses.iter();
        let exposed = addresses.filter_map(|address| self.exposure("listen.address", *address));
        let mut problems: Vec<_> = exposed.collect();
        let mut require = |ok: bool, key: &str, reason: String| {
            if !ok {
                problems.push(SettingProblem::new(key, reason));
            }
        };
        check_validity(self.token, &mut require);
        self.listen.check(&mut require);
        let local = self
            .admin
            .address
            .is_some_and(|address| address.ip().is_loopback());
        require(
            local || !self.admin.quit,
            "admin.quit",
            "has no effect unless admin.address is a loopback address".to_owned(),
        );
        self.access.check(&mut require);
        require(
            self.errors.format == ErrorBodyFormat::Kling
                || self.errors.statuses == StatusMapping::Documented,
            "errors.status",
            "has no effect with errors.format = \"upstream\"".to_owned(),
        );
        self.check_durations(&mut require);
        require(
            ATTEMPTS.contains(&self.retry.attempts),
            "retry.attempts",
            format!("want 1 to 10, got {}", self.retry.attempts),
        );
        require(
            SPEEDS.contains(&self.sandbox.speed),
            "sandbox.speed",
            format!("want 1 to {}", SPEEDS.end()),
        );
        require(
            self.sandbox.foreign <= MOST_FOREIGN,
            "sandbox.foreign",
            format!("want at most {MOST_FOREIGN}"),
        );
        for (key, number) in [
            ("limits.connections", self.limits.connections),
            ("limits.in_flight", self.limits.in_flight),
        ] {
            require(number > 0, key, "want more than 0".to_owned());
        }
        problems
    }

    /// Finds durations that are too long, and timeouts of zero.
    fn check_durations(&self, require: &mut impl FnMut(bool, &str, String)) {
        for (key, duration) in [
            ("upstream.connect_timeout", self.upstream.timeouts.connect),
            ("upstream.response_timeout", self.upstream.timeouts.response),
            ("upstream.idle_timeout", self.upstream.timeouts.idle),
            ("limits.header_timeout", self.limits.header_timeout),
        ] {
            let fits = !duration.is_zero() && duration <= LONGEST_WAIT;
            require(fits, key, "want more than 0s and at most 24h".to_owned());
        }
        for (key, duration) in [
            ("upstream.keep_warm", self.upstream.warmth.keep),
            ("shutdown.delay", self.shutdown.delay),
            ("shutdown.drain", self.shutdown.drain),
            ("retry.total_time", self.retry.total_time),
            ("sandbox.task_time", self.sandbox.task_time),
            ("sandbox.latency", self.sandbox.latency),
            ("token.not_before_leeway", self.token.not_before_leeway),
        ] {
            require(duration <= LONGEST_WAIT, key, "want at most 24h".to_owned());
        }
    }

    /// Returns a problem with `place` if other machines can reach `address`, and neither client tokens nor
    /// `listen.unsafe_allow_remote` are set.
    pub fn exposure(&self, place: &str, address: SocketAddr) -> Option<SettingProblem> {
        let protected = self.access.client_tokens_file.is_some() || self.listen.unsafe_allow_remote;
        let exposed = !protected && !address.ip().is_loopback();
        exposed.then(|| {
            let reason = format!(
                "{address} can be reached from other machines, which could spend your key: \
                 set access.client_tokens_file, so that clients have to show a token, or \
                 listen.unsafe_allow_remote = true"
            );
            SettingProblem::new(place, reason)
        })
    }
}

// === impl ListenSettings ===

impl ListenSettings {
    /// Finds a certificate without its key, or a key without its certificate.
    fn check(&self, require: &mut impl FnMut(bool, &str, String)) {
        let certificate = ("listen.tls.certificate_file", &self.certificate_file);
        let key = ("listen.tls.key_file", &self.key_file);
        for [(one, file), (other, other_file)] in [[certificate, key], [key, certificate]] {
            require(
                file.is_some() || other_file.is_none(),
                one,
                format!("want a file, since {other} is set"),
            );
        }
    }
}

// === impl AccessSettings ===

impl AccessSettings {
    /// Finds entries that can never match a request, and an empty list of hosts.
    fn check(&self, require: &mut impl FnMut(bool, &str, String)) {
        require(
            !self.allowed_hosts.is_empty(),
            "access.allowed_hosts",
            "want a host: without one every request is refused".to_owned(),
        );
        for host in &self.allowed_hosts {
            require(
                is_host(host),
                "access.allowed_hosts",
                format!("want host names without scheme and port, got `{host}`"),
            );
        }
        for origin in &self.allowed_origins {
            require(
                origin.to_str().is_ok_and(is_web_origin),
                "access.allowed_origins",
                format!("want origins such as \"http://localhost:3000\", got {origin:?}"),
            );
        }
        for method in &self.allowed_methods {
            require(
                !method.as_str().contains(|c: char| c.is_ascii_lowercase()),
                "access.allowed_methods",
                format!("methods are upper case, got `{method}`"),
            );
        }
        for path in &self.allowed_paths {
            require(
                path.starts_with('/') && !path.contains([',', '"', '?', '#']),
                "access.allowed_paths",
                format!("want paths that begin with `/`, got `{path}`"),
            );
        }
    }
}

/// Finds a lifetime that Kling would not accept, and a `refresh_before` that is not less than the lifetime.
fn check_validity(token: Validity, require: &mut impl FnMut(bool, &str, String)) {
    let lifetime = humantime::format_duration(token.lifetime);
    require(
        LIFETIMES.contains(&token.lifetime),
        "token.lifetime",
        format!("want 1m to 30m, got {lifetime}"),
    );
    require(
        token.refresh_before < token.lifetime,
        "token.refresh_before",
        format!("want less than token.lifetime, {lifetime}"),
    );
}
