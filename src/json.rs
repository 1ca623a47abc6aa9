//! Writes JSON objects member by member. Mostly a text has nothing to escape and goes in one piece;
//! `serde_json` looks at each byte on its own, which made a refused request a fifth dearer.

use std::io::{self, Write};

use serde::Serialize;

/// An object that is being written. The names of its members stand in the source, and none has
/// anything to escape.
pub struct Object(String);

/// Takes what `serde_json` writes, which is text in whole characters.
struct Sink<'a>(&'a mut String);

// === impl Object ===

impl Object {
    /// An empty one, with room for so many bytes.
    pub fn with_capacity(bytes: usize) -> Self {
        let mut json = String::with_capacity(bytes);
        json.push('{');
        Self(json)
    }

    /// A member whose value is JSON already.
    pub fn raw(&mut self, name: &'static str, json: &str) {
        self.name(name);
        self.0.push_str(json);
    }

    /// A string.
    pub fn text(&mut self, name: &'static str, text: &str) {
        if is_special(text) {
            self.value(name, text);
            return;
        }
        self.name(name);
        self.0.push('"');
        self.0.push_str(text);
        self.0.push('"');
    }

    /// A string, a number, `true`, `false`, or `null` for nothing and for a float that is no number.
    pub fn value(&mut self, name: &'static str, value: impl Serialize) {
        self.name(name);
        // All of these have their JSON, and to write to a string cannot fail.
        let _ = serde_json::to_writer(Sink(&mut self.0), &value);
    }

    /// The whole object.
    pub fn end(mut self) -> String {
        self.0.push('}');
        self.0
    }

    fn name(&mut self, name: &'static str) {
        debug_assert!(!is_special(name), "{name} needs escaping");
        self.0.push_str(if self.0.len() > 1 { ",\"" } else { "\"" });
        self.0.push_str(name);
        self.0.push_str("\":");
    }
}

// === impl Sink ===

impl Write for Sink<'_> {
    fn write(&mut self, json: &[u8]) -> io::Result<usize> {
        self.0
            .push_str(str::from_utf8(json).map_err(io::Error::other)?);
        Ok(json.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether a text has something to escape. Unlike `any`, which stops at the first such byte, this goes
/// over many bytes at a time.
fn is_special(text: &str) -> bool {
    let special = |byte| matches!(byte, ..b' ' | b'"' | b'\\');
    let bytes = text.bytes();
    bytes.fold(false, |found, byte| found | special(byte))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn an_object_has_its_members_in_order() {
        let mut object = Object::with_capacity(0);
        assert_eq!(Object::with_capacity(0).end(), "{}");
        object.text("a", "b");
        object.value("c", -1);
        object.value("d", 2.0);
        object.value("e", f64::NAN);
        object.value("f", true);
        object.raw("g", "{}");
        assert_eq!(
            object.end(),
            r#"{"a":"b","c":-1,"d":2.0,"e":null,"f":true,"g":{}}"#
        );
    }

    proptest! {
        #[test]
        fn any_text_is_read_as_it_was_written(text: String) {
            let mut object = Object::with_capacity(0);
            object.text("name", &text);
            let read: Value = serde_json::from_str(&object.end()).unwrap();
            prop_assert_eq!(read, json!({ "name": text }));
        }
    }
}
