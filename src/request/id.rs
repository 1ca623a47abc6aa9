//! Ids of requests in responses and logs.

use http::{HeaderMap, HeaderName, HeaderValue};

/// Header in which a client may send its own id for a request.
const FROM_CLIENT: HeaderName = HeaderName::from_static("x-request-id");
/// Longest id accepted from a client, in bytes.
const LONGEST: usize = 64;

/// Request id of 1 to 64 letters, digits, `.`, `_` and `-`. It is safe in any header, log line and file name.
#[derive(Clone, Debug)]
pub struct RequestId(HeaderValue);

// === impl RequestId ===

impl RequestId {
    /// Returns the client's `x-request-id` if it is well formed, else a new id.
    pub fn of(headers: &HeaderMap) -> Self {
        match headers.get(FROM_CLIENT) {
            Some(value) if is_well_formed(value.as_bytes()) => Self(value.clone()),
            _ => Self::random(),
        }
    }

    /// Returns the id as text.
    pub fn as_str(&self) -> &str {
        // Both constructors allow ASCII only.
        self.0.to_str().unwrap_or_default()
    }

    /// Returns the id as a header value.
    pub fn into_value(self) -> HeaderValue {
        self.0
    }

    /// Creates a random id of 32 hexadecimal digits.
    pub fn random() -> Self {
        const HEX: &[u8; 16] = b"0123456789abcdef";
        let mut bits = fastrand::u128(..);
        let digits = [(); 32].map(|()| {
            let digit = HEX[(bits & 15) as usize];
            bits >>= 4;
            digit
        });
        Self(HeaderValue::from_bytes(&digits).unwrap_or(HeaderValue::from_static("unnamed")))
    }
}

fn is_well_formed(id: &[u8]) -> bool {
    (1..=LONGEST).contains(&id.len())
        && id
            .iter()
            .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_well_formed_id_of_the_client_is_taken() {
        let longest = "x".repeat(64);
        let too_long = "x".repeat(65);
        for (sent, taken) in [
            ("a", true),
            ("A.b_c-9", true),
            (&*longest, true),
            (&*too_long, false),
            ("", false),
            ("a b", false),
            ("a\tb", false),
            ("{\"a\":1}", false),
        ] {
            let headers =
                HeaderMap::from_iter([(FROM_CLIENT, HeaderValue::from_str(sent).unwrap())]);
            assert_eq!(RequestId::of(&headers).as_str() == sent, taken, "{sent:?}");
        }
    }

    #[test]
    fn a_new_id_is_32_hexadecimal_digits_and_not_the_last_one() {
        let [a, b] = [(); 2].map(|()| RequestId::of(&HeaderMap::new()));
        assert!(a.as_str().len() == 32 && a.as_str().bytes().all(|b| b.is_ascii_hexdigit()));
        assert_ne!(a.as_str(), b.as_str());
    }
}
