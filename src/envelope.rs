//! Reads Kling's envelope, `{"code": …, "message": …, "request_id": …, "data": …}`, from whole and
//! from partial JSON texts.

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::error::Category;
use serde_json::value::RawValue;

/// The top-level members of an envelope.
#[derive(Debug, Default)]
pub struct Envelope {
    /// 0 for success; else a service code. A string of digits is read as that number.
    pub code: i64,
    /// What upstream says of it.
    pub message: Option<String>,
    /// Upstream's name for the request.
    pub request_id: Option<String>,
    /// Any further data, to the letter: its integers do not fit a float. Never `null`.
    pub data: Option<Box<RawValue>>,
}

/// What the beginning of a text says of its top-level `code`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Peek {
    /// It is an envelope with this code.
    Code(i64),
    /// Whatever follows, it is not an envelope.
    NoEnvelope,
    /// What follows decides.
    #[default]
    Undecided,
}

/// Looks for the code in the beginning of a text, and reads no further than it must.
pub fn peek(beginning: &[u8]) -> Peek {
    // How Kling writes a success: reading it as JSON would cost a poll a thousand instructions more.
    if beginning.starts_with(br#"{"code":0,"#) {
        return Peek::Code(0);
    }
    let mut members = Members {
        until_code: true,
        ..Members::default()
    };
    let read = members.read(beginning);
    match (members.code, read) {
        (Peek::Undecided, Err(error)) if may_go_on(&error, beginning) => Peek::Undecided,
        (Peek::Undecided, _) => Peek::NoEnvelope,
        // Where the reader stopped behind it, `serde_json` misses the rest.
        (decided, _) => decided,
    }
}

/// Reads a text that is all there. `None` if it is not an envelope.
pub fn read(text: &[u8]) -> Option<Envelope> {
    let mut members = Members::default();
    members.read(text).ok()?;
    members.into_envelope()
}

/// Reads what the beginning of a longer text holds. `None` if that shows no envelope.
pub fn read_beginning(beginning: &[u8]) -> Option<Envelope> {
    let mut members = Members::default();
    match members.read(beginning) {
        Err(error) if !may_go_on(&error, beginning) => None,
        _ => members.into_envelope(),
    }
}

/// Whether the error is only that the text ends. Of a number that is cut behind one of these
/// characters `serde_json` says instead that it is malformed.
fn may_go_on(error: &serde_json::Error, beginning: &[u8]) -> bool {
    let in_number = || matches!(beginning.last(), Some(b'-' | b'+' | b'.' | b'e' | b'E'));
    match error.classify() {
        Category::Eof => true,
        Category::Syntax => in_number(),
        Category::Data | Category::Io => false,
    }
}

/// Collects members as they are read, so that what stands before a cut is not lost.
#[derive(Default)]
struct Members {
    /// [`Peek::NoEnvelope`] for a code that is neither an integer nor a string of digits.
    code: Peek,
    message: Option<String>,
    request_id: Option<String>,
    data: Option<Box<RawValue>>,
    /// Stop as soon as the code is known.
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
    fn read(&mut self, text: &[u8]) -> Result<(), serde_json::Error> {
        let mut deserializer = serde_json::Deserializer::from_slice(text);
        DeserializeSeed::deserialize(&mut *self, &mut deserializer)?;
        deserializer.end()
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
            // Only now: a code at the very end of a beginning may lack its last digits.
            self.code = code;
            if self.until_code && code != Peek::Undecided {
                return Ok(());
            }
            match name {
                Name::Code => {
                    let value = map.next_value::<&RawValue>()?;
                    // Of two codes the first counts, as it does for `peek`.
                    if code == Peek::Undecided {
                        code = integer(value.get()).map_or(Peek::NoEnvelope, Peek::Code);
                    }
                }
                Name::Message => self.message = text(map.next_value()?),
                Name::RequestId => self.request_id = text(map.next_value()?),
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

/// `1303` or `"1303"`.
fn integer(json: &str) -> Option<i64> {
    if !json.starts_with('"') {
        return json.parse().ok();
    }
    let digits: String = serde_json::from_str(json).ok()?;
    let plain = digits.bytes().all(|b| b.is_ascii_digit());
    plain.then(|| digits.parse().ok()).flatten()
}

/// A string; of anything else, its JSON text; of `null`, nothing.
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
            code in any::<i64>(),
            message in any::<String>(),
            before in any::<bool>(),
            cut in any::<prop::sample::Index>(),
        ) {
            let message = serde_json::to_string(&message).unwrap();
            let text = if before {
                format!(r#"{{"message":{message},"code":{code},"data":{{"code":1}}}}"#)
            } else {
                format!(r#"{{"code":{code},"message":{message},"data":{{"code":1}}}}"#)
            };
            prop_assert_eq!(read(text.as_bytes()).map(|read| read.code), Some(code));
            let beginning = &text.as_bytes()[..cut.index(text.len())];
            let peeked = peek(beginning);
            prop_assert!([Peek::Undecided, Peek::Code(code)].contains(&peeked), "{peeked:?}");
            let read = read_beginning(beginning).map(|read| read.code);
            prop_assert!([None, Some(code)].contains(&read), "{read:?}");
        }
    }
}
