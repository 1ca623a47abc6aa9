//! The text form of each type of setting.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use figment::value::Value;
use http::{HeaderValue, Method};
use tracing_subscriber::filter::Targets;

use super::log_filter;
use crate::auth::secret::Secret;
use crate::layer::normalise::{self, StatusMapping};
use crate::sandbox;
use crate::tasks::place::{NoStateUrl, StateUrl};
use crate::telemetry;
use crate::upstream::{EgressProxy, NoEgressProxy, Origin};

/// A type that a setting can have.
pub(super) trait Setting: Sized {
    /// Describes a valid value, for the message about a wrong one.
    fn want() -> String;

    /// Reads a value. The error holds a reason if [`want`](Self::want) does not suffice.
    fn read(value: &Value) -> Result<Self, Option<String>>;
}

/// A signed number of seconds.
#[derive(Clone, Copy)]
pub(super) struct Offset(pub(super) i64);

/// An address, or `None` for the text `off`.
pub(super) struct OrOff(pub(super) Option<SocketAddr>);

// === impl Setting ===

/// Implements [`Setting`] for types that are written as a text.
macro_rules! texts {
    ($($type:ty, $want:expr, $read:expr;)*) => {$(
        impl Setting for $type {
            fn want() -> String {
                $want.to_owned()
            }

            fn read(value: &Value) -> Result<Self, Option<String>> {
                $read(value.as_str().ok_or(None)?)
            }
        }
    )*};
}

texts! {
    String, "a text", |text: &str| Ok(text.to_owned());
    PathBuf, "a path", |text: &str| Ok(PathBuf::from(text));
    Secret, "a text", |text: &str| Ok(Secret::from(text.to_owned()));
    Duration, "a duration with its unit, such as \"30s\"",
        |text: &str| humantime::parse_duration(text).map_err(|_| None);
    ByteSize, "a size with its unit, such as \"64MiB\"", |text: &str| {
        let unit = text.ends_with(['B', 'b']);
        unit.then(|| text.parse().ok()).flatten().ok_or(None)
    };
    SocketAddr, "an IP address with its port, such as \"127.0.0.1:5546\"",
        |text: &str| text.parse().map_err(|_| None);
    OrOff, "an IP address with its port, such as \"127.0.0.1:5547\", or \"off\"", |text: &str| {
        match text {
            "off" => Ok(OrOff(None)),
            address => address.parse().map(|address| OrOff(Some(address))).map_err(|_| None),
        }
    };
    Offset, "a duration, such as \"-10m\"", |text: &str| {
        let (sign, size) = text.strip_prefix('-').map_or((1, text), |size| (-1, size));
        let size = humantime::parse_duration(size).map_err(|_| None)?;
        Ok(Offset(sign * i64::try_from(size.as_secs()).map_err(|_| None)?))
    };
    Origin, "a URL", |text: &str| text.parse::<Origin>().map_err(|error| Some(error.to_string()));
    EgressProxy, "a URL", |text: &str| {
        text.parse().map_err(|error: NoEgressProxy| Some(error.to_string()))
    };
    HeaderValue, "a header value", |text: &str| text.parse().map_err(|_| None);
    Method, "a method such as \"GET\"", |text: &str| text.parse().map_err(|_| None);
    Targets, "levels and targets as in RUST_LOG, such as \"info,kling_proxy=debug\"",
        log_filter::read;
    StatusMapping, "\"documented\" or \"actionable\"", |text: &str| match text {
        "documented" => Ok(StatusMapping::Documented),
        "actionable" => Ok(StatusMapping::Actionable),
        _ => Err(None),
    };
    normalise::ErrorBodyFormat, "\"kling\" or \"upstream\"", |text: &str| match text {
        "kling" => Ok(normalise::ErrorBodyFormat::Kling),
        "upstream" => Ok(normalise::ErrorBodyFormat::Upstream),
        _ => Err(None),
    };
    StateUrl, "\"auto\", \"memory\" or \"sqlite:FILE\"",
        |text: &str| text.parse().map_err(|error: NoStateUrl| Some(error.to_string()));
    sandbox::Results, "\"link\" or \"data\"", |text: &str| match text {
        "link" => Ok(sandbox::Results::Link),
        "data" => Ok(sandbox::Results::Data),
        _ => Err(None),
    };
    telemetry::LogFormat, "\"auto\", \"pretty\" or \"json\"", |text: &str| match text {
        "auto" => Ok(telemetry::LogFormat::Auto),
        "pretty" => Ok(telemetry::LogFormat::Pretty),
        "json" => Ok(telemetry::LogFormat::Json),
        _ => Err(None),
    };
}

impl Setting for bool {
    fn want() -> String {
        "true or false".to_owned()
    }

    fn read(value: &Value) -> Result<Self, Option<String>> {
        let text = || value.as_str()?.parse().ok();
        value.to_bool().or_else(text).ok_or(None)
    }
}

impl Setting for u64 {
    fn want() -> String {
        "a whole number".to_owned()
    }

    fn read(value: &Value) -> Result<Self, Option<String>> {
        let number = || u64::try_from(value.to_i128()?).ok();
        let text = || value.as_str()?.parse().ok();
        number().or_else(text).ok_or(None)
    }
}

/// Reads an empty text as `None`.
impl<T: Setting> Setting for Option<T> {
    fn want() -> String {
        T::want()
    }

    fn read(value: &Value) -> Result<Self, Option<String>> {
        if value.as_str() == Some("") {
            Ok(None)
        } else {
            T::read(value).map(Some)
        }
    }
}

/// Reads a list, or a single value as a list of one.
impl<T: Setting> Setting for Vec<T> {
    fn want() -> String {
        format!("{}, or a list of such", T::want())
    }

    fn read(value: &Value) -> Result<Self, Option<String>> {
        match value.as_array() {
            Some(values) => values.iter().map(T::read).collect(),
            None => Ok(vec![T::read(value)?]),
        }
    }
}
