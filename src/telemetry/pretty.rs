//! Formats log lines for people: one line per request, and one line per other event. JSON lines have all
//! fields; these have those that a person at a terminal needs.

use std::fmt::{self, Debug};

use jiff::Timestamp;
use jiff::tz::TimeZone;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields};
use tracing_subscriber::registry::LookupSpan;

use super::fit::{RequestLine, SEPARATOR, WIDEST};
use super::{INTERIM, printable};
use crate::clock::{Clock, SystemClock};
use crate::kling::service_code;
use crate::style::{Palette, Tone};

/// Formats an event as a line for people.
pub(super) struct PrettyLine {
    palette: Palette,
    /// Returns the width of a line, in columns. A terminal may change its width at any time.
    width: fn() -> usize,
    /// True if the lines scroll by, and are not kept in a file.
    is_terminal: bool,
    clock: Box<dyn Clock>,
    zone: TimeZone,
}

/// Keeps the request id of a span, and none of its other fields.
pub(super) struct SpanId;

/// Fields of an event as printable text, in their order.
#[derive(Default)]
struct Fields(Vec<(&'static str, String)>);

/// Length of the beginning of a request id that tells requests apart, in characters.
const ID_LENGTH: usize = 8;

// === impl PrettyLine ===

impl PrettyLine {
    /// Makes the format of standard error. Reads the time zone once: from `TZ`, else from the system's
    /// setting. An unknown zone counts as UTC.
    pub(super) fn new(is_terminal: bool) -> Self {
        Self {
            palette: Palette::of(&std::io::stderr()),
            width: if is_terminal {
                terminal_width
            } else {
                || WIDEST
            },
            is_terminal,
            clock: Box::new(SystemClock),
            zone: TimeZone::system(),
        }
    }

    /// Returns the local time of day.
    fn time(&self) -> String {
        let now = Timestamp::try_from(self.clock.now()).unwrap_or_default();
        let now = self.zone.to_datetime(now);
        format!("{:02}:{:02}:{:02}", now.hour(), now.minute(), now.second())
    }

    /// Formats an event about a request, which has its path.
    fn request(
        &self,
        path: String,
        mut fields: Fields,
        id: Option<String>,
        level: Level,
    ) -> String {
        let status = fields.take("http.response.status_code");
        let code = status.as_deref().and_then(|status| status.parse().ok());
        let tone = match code {
            Some(code @ 400..) => Tone::of_status(code),
            _ if level <= Level::WARN => Tone::Warning,
            Some(code) => Tone::of_status(code),
            None => Tone::Normal,
        };
        let task = fields.take("task.id").map(|id| format!("task {id}"));
        // A task with an id of its own is found by that.
        let external = fields.take("task.external_id");
        let external = external.filter(|_| code.is_none_or(|code| code < 400));
        let task = task.or_else(|| external.map(|id| format!("external id {id}")));
        let who: Vec<_> = fields.take("client").into_iter().chain(id).collect();
        let line = RequestLine {
            time: self.time(),
            status: status.unwrap_or_else(|| "---".to_owned()),
            tone,
            method: fields.take("http.request.method"),
            path,
            duration: duration(&mut fields),
            hint: hint(&mut fields),
            keeps_hint: tone == Tone::Warning && code.is_none_or(|code| code < 400),
            task,
            who: (!who.is_empty()).then(|| who.join(" ")),
        };
        line.fit((self.width)()).paint(self.palette)
    }

    /// Formats any other event: level, message, fields. Such a line is never cut.
    fn other(&self, mut fields: Fields, id: Option<String>, event: &Event<'_>) -> String {
        let (level, target) = (*event.metadata().level(), event.metadata().target());
        let paint = |tone, text: &str| self.palette.paint(tone, text).to_string();
        let tone = match level {
            Level::ERROR => Tone::Bad,
            Level::WARN => Tone::Warning,
            _ => Tone::Faint,
        };
        let mut parts = vec![paint(Tone::Faint, &self.time())];
        if level != Level::INFO {
            parts.push(paint(tone, level.as_str()));
        }
        // The messages of other crates make no sense without their origin.
        let is_ours = target.starts_with(env!("CARGO_CRATE_NAME"));
        let origin = (!is_ours).then(|| format!("{target}:"));
        let text = origin.into_iter().chain(fields.take("message"));
        parts.push(text.collect::<Vec<_>>().join(" "));
        parts.extend(fields.0.iter().map(|(name, value)| {
            let name = paint(Tone::Faint, &format!("{name}="));
            if value.contains(' ') {
                format!("{name}\"{value}\"")
            } else {
                format!("{name}{value}")
            }
        }));
        parts.extend(id.map(|id| paint(Tone::Faint, &id)));
        parts.join(SEPARATOR)
    }
}

impl<S> FormatEvent<S, SpanId> for PrettyLine
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, SpanId>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let metadata = event.metadata();
        // The line of the outcome follows. A file keeps both: if the process is killed in between, this is
        // the only trace of the create.
        if self.is_terminal && metadata.name() == INTERIM {
            return Ok(());
        }
        let mut fields = Fields::default();
        event.record(&mut fields);
        let id = fields.take("request_id").or_else(|| span_id(context));
        let id = id.map(|id| id.chars().take(ID_LENGTH).collect());
        let line = match fields.take("url.path") {
            Some(path) => self.request(path, fields, id, *metadata.level()),
            None => self.other(fields, id, event),
        };
        writeln!(writer, "{line}")
    }
}

/// Returns the request id of the innermost span that has one.
fn span_id<S>(context: &FmtContext<'_, S, SpanId>) -> Option<String>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    let mut spans = context.event_scope()?;
    spans.find_map(|span| {
        let extensions = span.extensions();
        let id = extensions.get::<FormattedFields<SpanId>>()?;
        (!id.is_empty()).then(|| id.to_string())
    })
}

/// Returns the time until the response, and the number of retries in it.
fn duration(fields: &mut Fields) -> Option<String> {
    let seconds: f64 = fields.take("duration_seconds")?.parse().ok()?;
    let took = if seconds < 0.001 {
        "<1 ms".to_owned()
    } else if seconds < 1.0 {
        format!("{:.0} ms", seconds * 1e3)
    } else if seconds < 10.0 {
        format!("{seconds:.1} s")
    } else {
        format!("{seconds:.0} s")
    };
    Some(match fields.take("http.request.resend_count").as_deref() {
        None => took,
        Some("1") => format!("{took}, 1 retry"),
        Some(count) => format!("{took}, {count} retries"),
    })
}

/// Returns the error with advice, or the message of an event that is more than an answer.
fn hint(fields: &mut Fields) -> Option<String> {
    let message = fields.take("message").unwrap_or_default();
    let Some(kind) = fields.take("error.type") else {
        return (message != "answered").then_some(message);
    };
    let cause = fields.take("error.cause").unwrap_or_default();
    let Some(code) = fields.take("error.code") else {
        return Some(format!("{message}: {kind}"));
    };
    let row = code.parse().ok().and_then(service_code::find);
    let advice = row
        .filter(|row| row.kind == kind)
        .and_then(|row| row.advice);
    let cause = cause
        .strip_prefix(&format!("service code {code}: "))
        .unwrap_or(&cause);
    Some(format!("{code} {kind}: {}", advice.unwrap_or(cause)))
}

/// Returns the width of the terminal at standard error, in columns.
fn terminal_width() -> usize {
    let size = rustix::termios::tcgetwinsize(std::io::stderr());
    let columns = size.map_or(0, |size| usize::from(size.ws_col));
    // A terminal without a known width has 0 columns.
    if columns == 0 {
        WIDEST
    } else {
        columns.min(WIDEST)
    }
}

// === impl SpanId ===

impl<'writer> FormatFields<'writer> for SpanId {
    fn format_fields<R: RecordFields>(
        &self,
        mut writer: Writer<'writer>,
        fields: R,
    ) -> fmt::Result {
        let mut all = Fields::default();
        fields.record(&mut all);
        all.take("id").map_or(Ok(()), |id| writer.write_str(&id))
    }
}

// === impl Fields ===

impl Fields {
    fn take(&mut self, name: &str) -> Option<String> {
        let index = self.0.iter().position(|(known, _)| *known == name)?;
        Some(self.0.remove(index).1)
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.push((field.name(), printable(value).into_owned()));
    }

    /// Rounds to thousandths: durations are in seconds.
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.record_str(field, &format!("{value:.3}"));
    }

    /// Records integers, booleans and errors too.
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.record_str(field, &format!("{value:?}"));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};
    use std::time::{Duration, SystemTime};

    use tracing::{debug, debug_span, error, info, warn};
    use tracing_subscriber::fmt::layer;
    use tracing_subscriber::layer::SubscriberExt;

    use super::super::{CREATES, READS};
    use super::*;

    /// 2026-12-01, 12:31:20 UTC.
    const NOW: Duration = Duration::from_secs(1_796_128_280);

    const CREATE: &str = "/v1/videos/text2video";
    const POLL: &str = "/v1/videos/text2video/104454366743201459";
    const ID: &str = "740fee2a6f2b4d0e9c3a7b1d5e8f0246";
    const TASK: &str = "104454366743201459";

    struct Fixed;

    impl Clock for Fixed {
        fn now(&self) -> SystemTime {
            SystemTime::UNIX_EPOCH + NOW
        }
    }

    /// Collects the lines that are written.
    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Written {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn format(width: fn() -> usize) -> PrettyLine {
        PrettyLine {
            palette: Palette::Plain,
            width,
            is_terminal: true,
            clock: Box::new(Fixed),
            zone: TimeZone::posix("JST-9").unwrap(),
        }
    }

    /// Returns the lines of the events that `log` makes.
    fn lines(format: PrettyLine, log: impl Fn()) -> Vec<String> {
        let written = Written::default();
        let writer = written.clone();
        let lines = layer()
            .fmt_fields(SpanId)
            .event_format(format)
            .with_writer(move || writer.clone());
        tracing::subscriber::with_default(tracing_subscriber::registry().with(lines), log);
        let written = written.0.lock().unwrap();
        let text = str::from_utf8(&written).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    /// Logs the success of a request, as the layer `trace` does.
    macro_rules! answered {
        ($level:ident, $target:expr, $method:expr, $path:expr, $seconds:expr, $($more:tt)*) => {
            $level!(
                target: $target, request_id = ID, http.request.method = $method, url.path = $path,
                http.response.status_code = 200_u16, duration_seconds = $seconds, $($more)* "answered"
            )
        };
    }

    /// Logs the failure of a create, as the layer `trace` does.
    fn failed(status: u16, resent: Option<u32>, kind: &str, code: i64, cause: &str) {
        warn!(
            target: CREATES, request_id = ID, client = None::<&str>, http.request.method = "POST",
            url.path = CREATE, http.request.resend_count = resent,
            http.response.status_code = status, duration_seconds = 0.0014,
            task.external_id = Some("cat-1"), error.type = kind, error.code = code,
            error.cause = cause, upstream.request_id = Some("9f0c"), "failed"
        );
    }

    /// Logs the outcome of a create of which the client does not learn.
    fn unheard(status: Option<u16>, task: Option<&str>, external: Option<&str>, text: &str) {
        warn!(
            target: CREATES, request_id = ID, url.path = CREATE, task.id = task,
            task.external_id = external, http.response.status_code = status, "{text}"
        );
    }

    fn log_requests() {
        answered!(debug, READS, "GET", POLL, 0.0122,);
        answered!(
            debug,
            READS,
            "GET",
            "/account/costs",
            0.0002,
            client = "studio",
        );
        info!(name: INTERIM, target: CREATES, request_id = ID, url.path = CREATE, "sending");
        let external = Some("cat-1");
        answered!(
            info,
            CREATES,
            "POST",
            CREATE,
            0.0354,
            task.id = TASK,
            task.external_id = external,
        );
        answered!(
            info,
            CREATES,
            "POST",
            CREATE,
            12.4,
            http.request.resend_count = 2,
            task.id = TASK,
        );
        let message = "service code 1102: Account balance not enough";
        failed(429, None, "resource_pack_depleted", 1102, message);
        failed(
            400,
            None,
            "invalid_parameter_value",
            1201,
            "service code 1201: duration must be 5 or 10",
        );
        failed(
            400,
            Some(1),
            "invalid_parameters",
            1200,
            "service code 1200: 参数错误：时长必须是五秒或者十秒之一，请检查",
        );
        failed(
            500,
            None,
            "unknown_service_code",
            1999,
            "service code 1999: new",
        );
        failed(
            404,
            None,
            "path_not_allowed",
            9004,
            "this path is not in `access.allowed_paths`",
        );
        failed(
            502,
            None,
            "upstream_unreachable",
            9101,
            "cannot connect to upstream: Connection refused (os error 111)",
        );
        let text = "the client has gone; its create was carried through";
        unheard(Some(200), Some(TASK), external, text);
        unheard(
            None,
            None,
            external,
            "no whole answer to a create; its task may exist and be billed",
        );
        unheard(
            None,
            None,
            None,
            "a create was cut off; its task may exist and be billed",
        );
        info!(
            target: CREATES, request_id = ID, url.path = CREATE,
            "cancelled, no task was made: the client has left"
        );
        debug!(target: READS, request_id = ID, url.path = POLL, "the client has gone before its answer");
    }

    #[test]
    fn request_is_one_line_of_at_most_110_columns() {
        let lines = lines(format(|| WIDEST), log_requests);
        assert_eq!(
            lines,
            [
                "21:31:20  200  GET  /v1/videos/text2video/104454366743201459  12 ms  740fee2a",
                "21:31:20  200  GET  /account/costs  <1 ms  studio 740fee2a",
                "21:31:20  200  POST /v1/videos/text2video  35 ms  task 104454366743201459  740fee2a",
                "21:31:20  200  POST /v1/videos/text2video  12 s, 2 retries  task 104454366743201459  740fee2a",
                "21:31:20  429  POST /v1/videos/text2video  1 ms  1102 resource_pack_depleted: buy a resource pack  740fee2a",
                "21:31:20  400  POST …/text2video  1 ms  1201 invalid_parameter_value: duration must be 5 or 10  740fee2a",
                "21:31:20  400  POST …/text2video  1 ms, 1 retry  1200 invalid_parameters: 参数错误：时长必须是五秒…  740fee2a",
                "21:31:20  500  POST /v1/videos/text2video  1 ms  1999 unknown_service_code: new  740fee2a",
                "21:31:20  404  POST …/text2video  1 ms  9004 path_not_allowed: this path is not in `access.allowed_…  740fee2a",
                "21:31:20  502  POST …/text2video  1 ms  9101 upstream_unreachable: cannot connect to upstream: Conn…  740fee2a",
                "21:31:20  200  …/text2video  the client has gone; its create was carried through  task 104454366743201459",
                "21:31:20  ---  …/text2video  no whole answer to a create; its task may exist and be billed  external id cat-1",
                "21:31:20  ---  /v1/videos/text2video  a create was cut off; its task may exist and be billed  740fee2a",
                "21:31:20  ---  /v1/videos/text2video  cancelled, no task was made: the client has left  740fee2a",
                "21:31:20  ---  /v1/videos/text2video/104454366743201459  the client has gone before its answer  740fee2a",
            ]
        );
    }

    #[test]
    fn request_is_one_line_on_a_narrow_terminal() {
        let lines = lines(format(|| 60), log_requests);
        assert_eq!(
            lines,
            [
                "21:31:20  200  GET  …/104454366743201459  12 ms  740fee2a",
                "21:31:20  200  GET  /account/costs  <1 ms  studio 740fee2a",
                "21:31:20  200  POST …/text2video  task 104454366743201459",
                "21:31:20  200  POST …/text2video  task 104454366743201459",
                "21:31:20  429  POST …/text2video  1102 resource_pack_deplet…",
                "21:31:20  400  POST …/text2video  1201 invalid_parameter_va…",
                "21:31:20  400  POST …/text2video  1200 invalid_parameters:…",
                "21:31:20  500  POST …/text2video  1999 unknown_service_code…",
                "21:31:20  404  POST …/text2video  9004 path_not_allowed: th…",
                "21:31:20  502  POST …/text2video  9101 upstream_unreachable…",
                "21:31:20  200  …/text2video  the client has…  task 104454366743201459",
                "21:31:20  ---  …/text2video  no whole answer…  external id cat-1",
                "21:31:20  ---  …/text2video  a create was cut off; its task…",
                "21:31:20  ---  …/text2video  cancelled, no task w…  740fee2a",
                "21:31:20  ---  …4366743201459  the client has gon…  740fee2a",
            ]
        );
    }

    #[test]
    fn other_event_is_one_line_that_is_not_cut() {
        let lines = lines(format(|| 60), || {
            info!(kind = "API key", source = "KLING_API_KEY", "credential");
            info!(error.type = "rate_limited", attempts = 1, wait_seconds = 0.873_089, request_id = ID, "sending again");
            let long = "limits.connections: 1024 connections may need 4096 open files, and this process may have 1024";
            warn!("{long}");
            error!(error = %"disk\nfull", "cannot render metrics");
            debug!(target: "hyper::proto", "read eof");
            debug_span!("request", id = ID).in_scope(|| debug!("connection kept ready"));
        });
        assert_eq!(
            lines,
            [
                "21:31:20  credential  kind=\"API key\"  source=KLING_API_KEY",
                "21:31:20  sending again  error.type=rate_limited  attempts=1  wait_seconds=0.873  740fee2a",
                "21:31:20  WARN  limits.connections: 1024 connections may need 4096 open files, and this process may have 1024",
                "21:31:20  ERROR  cannot render metrics  error=disk\\u{a}full",
                "21:31:20  DEBUG  hyper::proto: read eof",
                "21:31:20  DEBUG  connection kept ready  740fee2a",
            ]
        );
    }

    /// A file is a record: its reader may look for the trace of a create after the process was killed.
    #[test]
    fn line_before_a_create_is_for_files() {
        let sending =
            || info!(name: INTERIM, target: CREATES, request_id = ID, url.path = CREATE, "sending");
        let file = PrettyLine {
            is_terminal: false,
            ..format(|| WIDEST)
        };
        assert_eq!(lines(format(|| WIDEST), sending), [""; 0]);
        assert_eq!(
            lines(file, sending),
            ["21:31:20  ---  /v1/videos/text2video  sending  740fee2a"]
        );
    }

    #[test]
    fn colours_show_the_outcome() {
        let coloured = PrettyLine {
            palette: Palette::Colours,
            ..format(|| WIDEST)
        };
        let lines = lines(coloured, || {
            answered!(info, CREATES, "POST", CREATE, 0.0354, task.id = TASK,);
            failed(429, None, "resource_pack_depleted", 1102, "");
            failed(502, None, "upstream_unreachable", 9101, "refused");
            unheard(Some(200), Some(TASK), None, "carried through");
            warn!("careful");
        });
        let escaped: Vec<_> = lines
            .iter()
            .map(|line| line.replace('\u{1b}', "^"))
            .collect();
        assert_eq!(
            escaped,
            [
                "^[2m21:31:20^[0m  ^[32m200^[0m  POST /v1/videos/text2video  ^[2m35 ms^[0m  ^[1mtask 104454366743201459^[0m  ^[2m740fee2a^[0m",
                "^[2m21:31:20^[0m  ^[33m429^[0m  POST /v1/videos/text2video  ^[2m1 ms^[0m  ^[33m1102 resource_pack_depleted: buy a resource pack^[0m  ^[2m740fee2a^[0m",
                "^[2m21:31:20^[0m  ^[1m^[31m502^[0m  POST /v1/videos/text2video  ^[2m1 ms^[0m  ^[1m^[31m9101 upstream_unreachable: refused^[0m  ^[2m740fee2a^[0m",
                "^[2m21:31:20^[0m  ^[33m200^[0m  /v1/videos/text2video  ^[33mcarried through^[0m  ^[1mtask 104454366743201459^[0m  ^[2m740fee2a^[0m",
                "^[2m21:31:20^[0m  ^[33mWARN^[0m  careful",
            ]
        );
    }
}
