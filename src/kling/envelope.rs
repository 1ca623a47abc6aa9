//! Reads Kling's envelope, `{"code": …, "message": …, "request_id": …, "data": …}`, from complete and
//! from partial JSON texts.

use std::borrow::Cow;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::error::Category;
use serde_json::value::RawValue;

use crate::kling::service_code;

/// The top-level members of an envelope.
#[derive(Debug, Default)]
pub struct Envelope {
    /// 0 for success; else a service code. A string of digits is read as that number, with or without
    /// white space around them. A number with a fraction of 0 is read as an integer.
    pub code: i64,
    /// Message of upstream about the code.
    pub message: Option<String>,
    /// Upstream's name for the request. Never empty.
    pub request_id: Option<String>,
    /// Further data as unchanged JSON text, because its integers do not fit a float. Never `null`.
    pub data: Option<Box<RawValue>>,
}

/// Result of looking for the top-level `code` in the beginning of a text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Peek {
    /// The text is an envelope with this code.
    Code(i64),
    /// The text is not an envelope, however it goes on.
    NoEnvelope,
    /// The rest of the text is needed to decide.
    #[default]
    Undecided,
}

/// Byte order mark. Some programs begin a UTF-8 text with it. It is not part of the JSON, and a reader
/// may ignore it (RFC 8259, section 8.1).
const MARK: &[u8] = "\u{feff}".as_bytes();

/// Looks for the code in the beginning of a text. It reads no further than it must.
pub fn peek(beginning: &[u8]) -> Peek {
    // Fast path for the form in which Kling writes a success: parsing JSON would cost each poll a
    // thousand instructions more.
    if beginning.starts_with(br#"{"code":0,"#) {
        return Peek::Code(service_code::SUCCESS);
    }
    let (members, end) = Members::read(beginning, true);
    match (members.code, end) {
        (Peek::Undecided, End::Cut) => Peek::Undecided,
        (Peek::Undecided, _) => Peek::NoEnvelope,
        // If the reader stopped behind the code, `serde_json` reports that the rest is missing.
        (decided, _) => decided,
    }
}

/// Reads a complete text. Returns `None` if it is not an envelope. Bytes that are not UTF-8 become
/// U+FFFD.
pub fn read(text: &[u8]) -> Option<Envelope> {
    match Members::read(text, false) {
        (members, End::Whole) => members.into_envelope(),
        (_, End::Cut | End::Malformed) => None,
    }
}

/// Reads the members in the beginning of a longer text, like [`read`]. Returns `None` if they do not
/// show an envelope.
pub fn read_beginning(beginning: &[u8]) -> Option<Envelope> {
    match Members::read(beginning, false) {
        (members, End::Whole | End::Cut) => members.into_envelope(),
        (_, End::Malformed) => None,
    }
}

/// Returns a text, or the beginning of one, without its byte order mark.
fn without_mark(text: &[u8]) -> &[u8] {
    match text.strip_prefix(MARK) {
        Some(rest) => rest,
        // The text is cut off inside the mark.
        None if MARK.starts_with(text) => &[],
        None => text,
    }
}

/// Returns true if the error means only that the text ends too early. For a number that is cut off after
/// one of these characters, `serde_json` reports a malformed number instead.
fn may_go_on(error: &serde_json::Error, beginning: &[u8]) -> bool {
    let in_number = || matches!(beginning.last(), Some(b'-' | b'+' | b'.' | b'e' | b'E'));
    match error.classify() {
        Category::Eof => true,
        Category::Syntax => in_number(),
        Category::Data | Category::Io => false,
    }
}

/// State of the JSON at the end of a text.
#[derive(Clone, Copy)]
enum End {
    /// The text is one complete JSON value.
    Whole,
    /// The JSON is incomplete; the rest of the text may complete it.
    Cut,
    /// The text is not JSON, however it goes on.
    Malformed,
}

/// Members that are collected while they are read, so that those before a cut are not lost.
#[derive(Default)]
struct Members {
    /// [`Peek::NoEnvelope`] if [`integer`] cannot read the code.
    code: Peek,
    message: Option<String>,
    request_id: Option<String>,
    data: Option<Box<RawValue>>,
    /// True to stop as soon as the code is known.
    until_code: bool,
}

#[derive(Deserialize)]
#[serde(field_identifier, rename_all = "snake_case")]
enum Name {
    Code,
    Message,
    RequestId,
    Data,
    #[serde(other)]
    Other,
}

// === impl Members ===

impl Members {
    /// Reads the members of a text, or of the beginning of one. With `until_code` it stops as soon as
    /// the code is known.
    fn read(text: &[u8], until_code: bool) -> (Self, End) {
        let text = without_mark(text);
        let (mut members, mut outcome) = Self::read_utf8(text, until_code);
        let is_enough = until_code && members.code != Peek::Undecided;
        // `serde_json` refuses strings that are not UTF-8. Few texts have such strings: only those are
        // read twice, and other texts are not searched for them. The replacement changes only bytes that
        // are not ASCII, so no quote is lost.
        if !is_enough
            && outcome.as_ref().is_err_and(serde_json::Error::is_syntax)
            && let Cow::Owned(replaced) = String::from_utf8_lossy(text)
        {
            (members, outcome) = Self::read_utf8(replaced.as_bytes(), until_code);
        }
        let end = match outcome {
            Ok(()) => End::Whole,
            Err(error) if may_go_on(&error, text) => End::Cut,
            Err(_) => End::Malformed,
        };
        (members, end)
    }

    fn read_utf8(text: &[u8], until_code: bool) -> (Self, Result<(), serde_json::Error>) {
        let mut members = Self {
            until_code,
            ..Self::default()
        };
        let mut deserializer = serde_json::Deserializer::from_slice(text);
        let outcome = DeserializeSeed::deserialize(&mut members, &mut deserializer)
            .and_then(|()| deserializer.end());
        (members, outcome)
    }

    fn into_envelope(self) -> Option<Envelope> {
        let Self {
            code: Peek::Code(code),
            message,
            request_id,
            data,
            ..
        } = self
        else {
            return None;
        };
        Some(Envelope {
            code,
            message,
            request_id,
            data,
        })
    }
}

impl<'de> DeserializeSeed<'de> for &mut Members {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for &mut Members {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an envelope")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut code = Peek::Undecided;
        while let Some(name) = map.next_key()? {
            // The code is stored only when something follows it: at the end of a cut text its last
            // digits may be missing.
            self.code = code;
            if self.until_code && code != Peek::Undecided {
                return Ok(());
            }
            match name {
                Name::Code => {
                    let value = map.next_value::<&RawValue>()?;
                    // If there are two codes, the first counts, as it does for `peek`.
                    if code == Peek::Undecided {
                        code = integer(value.get()).map_or(Peek::NoEnvelope, Peek::Code);
                    }
                }
                Name::Message => self.message = text(map.next_value()?),
                Name::RequestId => {
                    self.request_id = text(map.next_value()?).filter(|id| !id.is_empty());
                }
                Name::Data => self.data = some_data(map.next_value()?),
                Name::Other => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        self.code = code;
        Ok(())
    }
}

/// Reads an integer that is written as `1303`, `1303.0`, `"1303"` or `" 1303"`.
fn integer(json: &str) -> Option<i64> {
    if json.starts_with('"') {
        let text: String = serde_json::from_str(json).ok()?;
        let digits = text.trim();
        let plain = digits.bytes().all(|b| b.is_ascii_digit());
        return plain.then(|| digits.parse().ok()).flatten();
    }
    json.parse().ok().or_else(|| {
        let (whole, fraction) = json.split_once('.')?;
        let zero = fraction.bytes().all(|b| b == b'0');
        zero.then(|| whole.parse().ok()).flatten()
    })
}

/// Returns the content of a JSON string, `None` for `null`, and the JSON text of any other value.
fn text(json: &RawValue) -> Option<String> {
    let json = json.get();
    let quoted = json
        .strip_prefix('"')
        .and_then(|text| text.strip_suffix('"'));
    match quoted {
        Some(plain) if !plain.contains('\\') => Some(plain.to_owned()),
        _ => serde_json::from_str(json).unwrap_or_else(|_| Some(json.to_owned())),
    }
}

fn some_data(json: &RawValue) -> Option<Box<RawValue>> {
    (json.get() != "null").then(|| json.to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_code_is_known_as_soon_as_what_follows_it_begins() {
        for (beginning, peeked) in [
            ("", Peek::Undecided),
            ("  ", Peek::Undecided),
            ("{", Peek::Undecided),
            (r#"{"co"#, Peek::Undecided),
            (r#"{"code":-"#, Peek::Undecided),
            (r#"{"cost":1."#, Peek::Undecided),
            (r#"{"cost":1e+"#, Peek::Undecided),
            (r#"{"code":13"#, Peek::Undecided),
            (r#"{"code":1303"#, Peek::Undecided),
            (r#"{"code":1303}"#, Peek::Code(1303)),
            (r#"{"code":1303,"m"#, Peek::Undecided),
            (r#"{"code":1303,"message":"#, Peek::Code(1303)),
            (r#"{"code":0,"message":"SUCCEED","data":{"#, Peek::Code(0)),
            (r#"{"code":"1303","x":1"#, Peek::Code(1303)),
            (r#"{"\u0063ode":1303,"x":1"#, Peek::Code(1303)),
            (r#"{"code":"\u00313","x":1"#, Peek::Code(13)),
            (r#"{"data":{"code":5},"code":7}"#, Peek::Code(7)),
            (r#"{"code":7,"code":0}"#, Peek::Code(7)),
            (r#"{"data":{"code":5}}"#, Peek::NoEnvelope),
            (r#"{"code":null,"x":1}"#, Peek::NoEnvelope),
            (r#"{"code":1.5,"x":1}"#, Peek::NoEnvelope),
            (r#"{"code":"12a","x":1}"#, Peek::NoEnvelope),
            (r#"{"code":"","x":1}"#, Peek::NoEnvelope),
            (r#"{"code":"  ","x":1}"#, Peek::NoEnvelope),
            (r#"{"code":"1 303","x":1}"#, Peek::NoEnvelope),
            (r#"{"code":"\t1303 ","x":1}"#, Peek::Code(1303)),
            (r#"{"code":" \u00313","x":1}"#, Peek::Code(13)),
            (r#"{"code":1303."#, Peek::Undecided),
            (r#"{"code":1303.0"#, Peek::Undecided),
            (r#"{"code":1303.0,"x":1"#, Peek::Code(1303)),
            (r#"{"code":-1.00}"#, Peek::Code(-1)),
            (r#"{"code":0.0,"x":1"#, Peek::Code(0)),
            (r#"{"code":1303.01,"x":1"#, Peek::NoEnvelope),
            (r#"{"code":1.303e3,"x":1"#, Peek::NoEnvelope),
            (r#"{"code":"1303.0","x":1"#, Peek::NoEnvelope),
            (r#"{"code":99999999999999999999,"x":1}"#, Peek::NoEnvelope),
            ("[1]", Peek::NoEnvelope),
            ("7", Peek::NoEnvelope),
            ("<html>", Peek::NoEnvelope),
            ("{}", Peek::NoEnvelope),
            ("{,", Peek::NoEnvelope),
        ] {
            assert_eq!(peek(beginning.as_bytes()), peeked, "{beginning}");
        }
    }

    #[test]
    fn bytes_that_are_no_utf8_hide_no_code() {
        for (beginning, peeked) in [
            (&b"\xef"[..], Peek::Undecided),
            (b"\xef\xbb", Peek::Undecided),
            (b"\xef\xbb\xbf", Peek::Undecided),
            (b"\xef\xbb\xbf{\"code\":0,", Peek::Undecided),
            (b"\xef\xbb\xbf{\"code\":0,\"x\":1", Peek::Code(0)),
            (b"\xef\xbb\xbf {\"code\":1303}", Peek::Code(1303)),
            (b"\xef\xbb{\"code\":1303}", Peek::NoEnvelope),
            (b"\xef\xbb\xbf\xef\xbb\xbf{\"code\":1303}", Peek::NoEnvelope),
            (b"{\"message\":\"\xb2\xa2", Peek::Undecided),
            (b"{\"message\":\"\xb2\xa2\",\"code\":13", Peek::Undecided),
            (
                b"{\"message\":\"\xb2\xa2\",\"code\":1303}",
                Peek::Code(1303),
            ),
            (
                b"{\"message\":\"\xb2\",\"code\":1303,\"x\":-",
                Peek::Code(1303),
            ),
            (
                b"{\"\xb2\":1,\"code\":1303,\"x\":\"\xe2\x82",
                Peek::Code(1303),
            ),
            (b"{\"code\":\"\xb2\",\"x\":1", Peek::NoEnvelope),
            (b"{\xb2", Peek::NoEnvelope),
            (b"\xb2", Peek::NoEnvelope),
        ] {
            assert_eq!(peek(beginning), peeked, "{}", beginning.escape_ascii());
        }
    }

    #[test]
    fn what_is_no_utf8_is_told_with_replacement_characters() {
        let text =
            b"\xef\xbb\xbf{\"message\":\"no \xb2\xa2\xe2\x82\",\"code\":1303,\"data\":[\"\xff\"]}";
        let beginning = [&text[..text.len() - 1], b",\"x\":\"\xe2"].concat();
        for read in [read(text), read_beginning(&beginning)] {
            let read = read.unwrap();
            let data = read.data.as_ref().map(|data| data.get());
            assert_eq!(
                (read.code, read.message.as_deref(), data),
                (
                    1303,
                    Some("no \u{fffd}\u{fffd}\u{fffd}"),
                    Some("[\"\u{fffd}\"]")
                )
            );
        }
    }

    #[test]
    fn data_is_kept_to_the_letter() {
        let text =
            br#"{"code":1201,"message":"m","request_id":"r","data":{"id": 842250903629086785}}"#;
        let read = read(text).unwrap();
        let data = read.data.as_ref().map(|data| data.get());
        assert_eq!(
            (
                read.code,
                read.message.as_deref(),
                read.request_id.as_deref(),
                data
            ),
            (
                1201,
                Some("m"),
                Some("r"),
                Some(r#"{"id": 842250903629086785}"#)
            )
        );
    }

    #[test]
    fn empty_request_id_is_none() {
        let read = read(br#"{"code":1201,"message":"","request_id":""}"#).unwrap();
        assert_eq!((read.message.as_deref(), read.request_id), (Some(""), None));
    }

    #[test]
    fn null_members_are_absent_and_others_are_shown_as_they_are() {
        let read = read(br#"{"code":1,"message":["a"],"request_id":7,"data":null}"#).unwrap();
        assert_eq!(
            (
                read.message.as_deref(),
                read.request_id.as_deref(),
                read.data.is_none()
            ),
            (Some(r#"["a"]"#), Some("7"), true)
        );
    }

    #[test]
    fn what_is_cut_off_or_followed_by_more_is_not_a_whole_envelope() {
        for text in [
            r#"{"code":1303,"message":"m""#,
            r#"{"code":1303} x"#,
            "",
            "null",
        ] {
            assert!(read(text.as_bytes()).is_none(), "{text}");
        }
    }

    #[test]
    fn the_beginning_of_a_long_envelope_says_what_stands_there() {
        let read = read_beginning(br#"{"code":1303,"message":"m","data":{"long":"#).unwrap();
        assert_eq!((read.code, read.message.as_deref()), (1303, Some("m")));
    }

    #[test]
    fn a_code_that_the_beginning_may_cut_through_is_not_read() {
        for beginning in [r#"{"code":13"#, r#"{"message":"m","code":0"#] {
            let read = read_beginning(beginning.as_bytes());
            assert!(read.is_none(), "{beginning}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes: Vec<u8>) {
            let _ = (peek(&bytes), read(&bytes), read_beginning(&bytes));
        }

        #[test]
        fn every_beginning_agrees_with_the_whole(
            (code, written) in code(),
            message in message(),
            marked in any::<bool>(),
            before in any::<bool>(),
            cut in any::<prop::sample::Index>(),
        ) {
            let quoted = quoted(&message);
            let [message_member, code_member] =
                [[b"\"message\":", &*quoted].concat(), [b"\"code\":", written.as_bytes()].concat()];
            let members = if before {
                [message_member, code_member]
            } else {
                [code_member, message_member]
            };
            let mark = if marked { "\u{feff}" } else { "" };
            let text = [
                mark.as_bytes(),
                b"{",
                &members.join(&b','),
                b",\"data\":{\"code\":1}}",
            ]
            .concat();
            let whole = read(&text).map(|read| (read.code, read.message));
            let told = String::from_utf8_lossy(&message).into_owned();
            prop_assert_eq!(whole, Some((code, Some(told))));
            prop_assert_eq!(peek(&text), Peek::Code(code));
            let beginning = &text[..cut.index(text.len())];
            let peeked = peek(beginning);
            prop_assert!([Peek::Undecided, Peek::Code(code)].contains(&peeked), "{peeked:?}");
            let read = read_beginning(beginning).map(|read| read.code);
            prop_assert!([None, Some(code)].contains(&read), "{read:?}");
        }
    }

    /// Generates a code, and one of the ways to write it.
    fn code() -> impl Strategy<Value = (i64, String)> {
        prop_oneof![
            any::<i64>().prop_map(|code| (code, code.to_string())),
            any::<i64>().prop_map(|code| (code, format!("{code}.00"))),
            (0..i64::MAX).prop_map(|code| (code, format!("\" {code}\\n\""))),
        ]
    }

    /// Generates messages, some of which are not UTF-8.
    fn message() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            any::<String>().prop_map(String::into_bytes),
            any::<Vec<u8>>()
        ]
    }

    /// Returns a JSON string, except that bytes that are not UTF-8 stay as they are.
    fn quoted(text: &[u8]) -> Vec<u8> {
        let escaped = text.iter().flat_map(|byte| match byte {
            b'"' | b'\\' => vec![b'\\', *byte],
            ..b' ' => format!("\\u{byte:04x}").into_bytes(),
            _ => vec![*byte],
        });
        [vec![b'"'], escaped.collect(), vec![b'"']].concat()
    }
}
