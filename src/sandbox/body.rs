//! Reads the body of a request without keeping all of it.
//!
//! An image in Base64 has tens of megabytes, but only its beginning is checked. So while the body arrives,
//! each text is shortened to the length that the rules of `endpoints` need.

use std::time::Duration;

use axum::body::Body;
use http_body_util::BodyExt;
use tokio::time::timeout;

use super::reply::Refusal;

/// Collects the JSON of a body, with long texts shortened. Valid JSON stays valid, and invalid JSON stays
/// invalid.
#[derive(Default)]
struct Shortener {
    kept: Vec<u8>,
    place: Place,
    /// Bytes kept of the current text.
    length: usize,
}

#[derive(Clone, Copy, Default)]
enum Place {
    /// Between texts, where every byte is kept.
    #[default]
    Between,
    Text,
    /// After a backslash, which is not kept yet.
    Escape,
    /// Inside an escape such as `\u00e9`, with this many digits still to come.
    Digits(u8),
}

/// Longest silence inside a body.
const PATIENCE: Duration = Duration::from_secs(30);
/// Largest body, in bytes. Ten images in Base64 come to 133 MB.
const LARGEST_BODY: usize = 256 << 20;
/// Most bytes kept of a text. The longest text that `endpoints` allows has 3072 characters. An escaped
/// character takes at most 12 bytes.
const LONGEST_TEXT: usize = 48 << 10;
/// Most bytes kept of a body. A parsed JSON value takes up to 16 times the memory of its text.
const MOST_KEPT: usize = 2 << 20;

/// Reads the JSON of a body, with long texts shortened.
///
/// # Errors
///
/// 1201 if the body is incomplete or too large, 1200 if too many bytes of it are outside long texts.
pub(super) async fn read(mut body: Body) -> Result<Vec<u8>, Refusal> {
    let mut shortener = Shortener::default();
    let (mut size, mut is_too_much) = (0, false);
    let silent = |_| Refusal::parameter("The request body is not sent");
    while let Some(frame) = timeout(PATIENCE, body.frame()).await.map_err(silent)? {
        let frame = frame.map_err(|error| {
            Refusal::parameter(format!("The request body cannot be read: {error}"))
        })?;
        let Ok(data) = frame.into_data() else {
            continue;
        };
        size += data.len();
        if size > LARGEST_BODY {
            let limit = LARGEST_BODY >> 20;
            return Err(Refusal::parameter(format!(
                "The request body is over {limit} MiB"
            )));
        }
        if !is_too_much {
            shortener.push(&data);
            is_too_much = shortener.kept.len() > MOST_KEPT;
        }
    }
    if is_too_much {
        let limit = MOST_KEPT >> 20;
        let message = format!("Without its long texts the request body is over {limit} MiB");
        return Err(Refusal::new(1200, message));
    }
    Ok(shortener.kept)
}

// === impl Shortener ===

impl Shortener {
    fn push(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.take(byte);
        }
    }

    fn take(&mut self, byte: u8) {
        let is_long = self.length >= LONGEST_TEXT;
        match (self.place, byte) {
            (Place::Between, b'"') => {
                self.length = 0;
                self.place = Place::Text;
                self.kept.push(byte);
            }
            (Place::Between, _) => self.kept.push(byte),
            (Place::Text, b'"') => {
                self.place = Place::Between;
                self.kept.push(byte);
            }
            (Place::Text, b'\\') => self.place = Place::Escape,
            // Drops printable ASCII only. Bytes of other characters and illegal bytes are kept.
            (Place::Text, b' '..=b'~') if is_long => {}
            (Place::Text, _) => self.keep(&[byte]),
            (Place::Escape, b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') if is_long => {
                self.place = Place::Text;
            }
            (Place::Escape, _) => {
                self.place = match byte {
                    b'u' => Place::Digits(4),
                    _ => Place::Text,
                };
                self.keep(&[b'\\', byte]);
            }
            (Place::Digits(left), b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => {
                self.place = match left {
                    0 | 1 => Place::Text,
                    _ => Place::Digits(left - 1),
                };
                self.keep(&[byte]);
            }
            // This is not JSON. The parser will report it.
            (Place::Digits(_), _) => {
                self.place = Place::Text;
                self.take(byte);
            }
        }
    }

    fn keep(&mut self, bytes: &[u8]) {
        self.length += bytes.len();
        self.kept.extend_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn shorten(body: &[u8]) -> Vec<u8> {
        let mut shortener = Shortener::default();
        shortener.push(body);
        shortener.kept
    }

    #[test]
    fn a_body_without_long_texts_is_kept_as_it_is() {
        for body in [
            r#"{"a":"b\"c\\","d":[1, 2.5e3, null],"e\u00e9":"\ud83d\ude00é"}"#,
            "",
            "no JSON",
            r#"{"a":"\q"}"#,
            r#"{"a":"\u00"}"#,
            r#"{"a":"b"#,
        ] {
            assert_eq!(shorten(body.as_bytes()), body.as_bytes(), "{body}");
        }
    }

    #[test]
    fn a_long_text_begins_as_it_did_and_what_follows_stays() {
        for piece in ["iVBORw0KGgo/", "iVBORw0KGgo\\/", "\\n", "\\\\", "\\\""] {
            let text = piece.repeat(1 << 16);
            let whole = format!(r#"{{"a":"{text}","b":["{text}","c"],"d":1}}"#);
            let kept = shorten(whole.as_bytes());
            assert!(kept.len() < 3 * LONGEST_TEXT, "{piece}: {}", kept.len());
            let [whole, kept]: [Value; 2] =
                [whole.as_bytes(), &kept].map(|body| serde_json::from_slice(body).unwrap());
            assert_eq!((&kept["b"][1], &kept["d"]), (&json!("c"), &json!(1)));
            for path in ["/a", "/b/0"] {
                let text = |body: &Value| body.pointer(path).unwrap().as_str().unwrap().to_owned();
                assert!(text(&whole).starts_with(&text(&kept)), "{piece}");
                assert!(text(&kept).chars().count() > 3072, "{piece}");
            }
        }
    }

    #[test]
    fn a_long_text_that_is_no_json_stays_none() {
        let text = "a".repeat(LONGEST_TEXT);
        for end in ["\\q\"", "\\u12\"", "\n\"", "\\u12", "\\", "", "\"x", "\\\""] {
            let body = format!(r#"["{text}{end}]"#);
            for body in [body.clone(), body.replace('a', "é")] {
                let kept = shorten(body.as_bytes());
                assert!(serde_json::from_slice::<Value>(&kept).is_err(), "{end}");
            }
        }
        let kept = shorten(&[text.as_bytes(), b"\xff"].concat());
        assert!(str::from_utf8(&kept).is_err());
    }

    #[test]
    fn every_escape_and_character_of_a_long_text_is_whole() {
        let text = "a".repeat(LONGEST_TEXT);
        for rest in ["é", "\\u00e9b", "\\ud83d\\ude00", "😀", "b\\\\", "\\\"b"] {
            for before in 0..8 {
                let body = format!(r#"["{}{rest}"]"#, &text[before..]);
                let kept: Value = serde_json::from_slice(&shorten(body.as_bytes())).unwrap();
                assert!(kept[0].is_string(), "{rest}");
            }
        }
    }

    #[tokio::test]
    async fn a_body_that_is_too_large_is_refused() {
        for (body, is_read) in [
            (vec![b' '; MOST_KEPT], true),
            (vec![b' '; MOST_KEPT + 1], false),
            (format!("\"{}", "a".repeat(MOST_KEPT)).into_bytes(), true),
        ] {
            assert_eq!(read(Body::from(body)).await.is_ok(), is_read);
        }
    }
}
