//! Formats a log line as a JSON object, with its members in the order that docs/operations.md shows.
//! `tracing_subscriber`'s own JSON format puts the span before the target, and adds the name of the
//! span.

use std::fmt;

use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::value::RawValue;
use tracing::{Event, Subscriber};
use tracing_serde::SerdeMapVisitor;
use tracing_subscriber::fmt::format::{JsonFields, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormattedFields};
use tracing_subscriber::registry::LookupSpan;

use crate::clock::{Clock, SystemClock};

/// Formats an event as one [log line](self).
pub(super) struct JsonLine;

/// Serializes an event as the members of a line.
struct LineMembers<'a> {
    event: &'a Event<'a>,
    /// The fields of the innermost span, if it has any.
    span: Option<&'a RawValue>,
}

/// Size that most lines stay below, in bytes.
const USUAL_SIZE: usize = 1 << 10;

// === impl JsonLine ===

impl<S> FormatEvent<S, JsonFields> for JsonLine
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, JsonFields>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let span = event.parent().and_then(|id| context.span(id));
        let span = span.or_else(|| context.lookup_current());
        let extensions = span.as_ref().map(|span| span.extensions());
        let fields = extensions
            .as_ref()
            .and_then(|all| all.get::<FormattedFields<JsonFields>>());
        let span = fields.and_then(|fields| serde_json::from_str(fields).ok());
        let mut line = Vec::with_capacity(USUAL_SIZE);
        serde_json::to_writer(&mut line, &LineMembers { event, span }).map_err(|_| fmt::Error)?;
        line.push(b'\n');
        writer.write_str(str::from_utf8(&line).map_err(|_| fmt::Error)?)
    }
}

// === impl LineMembers ===

impl Serialize for LineMembers<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let metadata = self.event.metadata();
        let timestamp = humantime::format_rfc3339_micros(SystemClock.now());
        let mut line = serializer.serialize_map(None)?;
        line.serialize_entry("timestamp", &format_args!("{timestamp}"))?;
        line.serialize_entry("level", metadata.level().as_str())?;
        let mut fields = SerdeMapVisitor::new(line);
        self.event.record(&mut fields);
        let mut line = fields.take_serializer()?;
        line.serialize_entry("target", metadata.target())?;
        if let Some(span) = self.span {
            line.serialize_entry("span", span)?;
        }
        line.end()
    }
}
