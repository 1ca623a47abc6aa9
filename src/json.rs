//! Writes JSON objects member by member. Mostly a text has nothing to escape and goes in one piece;
//! `serde_json` looks at each byte on its own, which made a refused request a fifth dearer.

use std::fmt::{Display, Write};

/// An object that is being written. The names of its members stand in the source, and none has
/// anything to escape.
pub struct Object(String);

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
        self.name(name);
        if is_special(text) {
            // A string is always JSON.
            let escaped = serde_json::to_string(text).unwrap_or_default();
            self.0.push_str(&escaped);
        } else {
            self.0.push('"');
            self.0.push_str(text);
            self.0.push('"');
        }
    }

    /// A number as JSON has them.
    pub fn number(&mut self, name: &'static str, number: impl Display) {
        self.name(name);
        // To write to a string cannot fail.
        let _ = write!(self.0, "{number}");
    }

    /// `true` or `false`.
    pub fn bool(&mut self, name: &'static str, value: bool) {
        self.raw(name, if value { "true" } else { "false" });
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
        object.number("c", -1);
        object.number("d", 0.5);
        object.bool("e", true);
        object.raw("f", "null");
        assert_eq!(
            object.end(),
            r#"{"a":"b","c":-1,"d":0.5,"e":true,"f":null}"#
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
