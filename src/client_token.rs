//! Who may call the proxy, where a file of client tokens says so (`access.client_tokens_file`).

use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::HeaderMap;
use http::header::AUTHORIZATION;
use ring::hmac;
use serde::Deserialize;
use subtle::{Choice, ConstantTimeEq};

use crate::clock::Clock;
use crate::headers::CLIENT_TOKEN;
use crate::secret::Secret;

/// The tokens that are accepted.
pub struct ClientTokens {
    tokens: Vec<Secret>,
    clock: Arc<dyn Clock>,
}

/// Shortest token accepted: less could be guessed.
const SHORTEST: usize = 16;

/// What is wrong with a file of tokens. It shows none of them.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It has no token.
    #[error("it holds no token")]
    Empty,
    /// A token is too short to be safe.
    #[error("line {0}: a token has at least {SHORTEST} characters")]
    Short(usize),
}

#[derive(Deserialize)]
struct Times {
    exp: i64,
    nbf: i64,
}

// === impl ClientTokens ===

impl ClientTokens {
    /// Reads one token a line, `token` or `name:token`; empty lines and `#` comments do not count.
    ///
    /// # Errors
    ///
    /// [`FileError`] names the line.
    pub fn parse(text: &str, clock: Arc<dyn Clock>) -> Result<Self, FileError> {
        let mut tokens = Vec::new();
        for (index, line) in text.lines().map(str::trim).enumerate() {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let token = line
                .split_once(':')
                .map_or(line, |(_name, token)| token.trim());
            if token.len() < SHORTEST {
                return Err(FileError::Short(index + 1));
            }
            tokens.push(Secret::from(token.to_owned()));
        }
        if tokens.is_empty() {
            Err(FileError::Empty)
        } else {
            Ok(Self { tokens, clock })
        }
    }

    /// Whether the request shows a token: in `kling-proxy-token`, as a bearer, or as the secret key
    /// of a JWT, which is what an unchanged Kling client sends.
    pub fn admit(&self, headers: &HeaderMap) -> bool {
        let shown = headers.get(CLIENT_TOKEN).map(http::HeaderValue::as_bytes);
        let bearer = headers
            .get(AUTHORIZATION)
            .and_then(|value| value.as_bytes().split_at_checked("Bearer ".len()))
            .and_then(|(scheme, rest)| scheme.eq_ignore_ascii_case(b"Bearer ").then_some(rest));
        shown.is_some_and(|shown| self.is_one(shown))
            || bearer.is_some_and(|bearer| self.is_one(bearer) || self.signed(bearer))
    }

    /// Compares with every token, each in constant time.
    fn is_one(&self, shown: &[u8]) -> bool {
        let matches = self
            .tokens
            .iter()
            .map(|token| token.expose().as_bytes().ct_eq(shown));
        matches.fold(Choice::from(0), |any, this| any | this).into()
    }

    /// Whether a JWT (HS256, `exp`, `nbf`) is signed with a token and valid now.
    fn signed(&self, jwt: &[u8]) -> bool {
        let Some((message, signature)) = jwt
            .iter()
            .rposition(|b| *b == b'.')
            .map(|dot| (&jwt[..dot], &jwt[dot + 1..]))
        else {
            return false;
        };
        let Ok(signature) = URL_SAFE_NO_PAD.decode(signature) else {
            return false;
        };
        let signed = self.tokens.iter().any(|token| {
            let key = hmac::Key::new(hmac::HMAC_SHA256, token.expose().as_bytes());
            hmac::verify(&key, message, &signature).is_ok()
        });
        signed && claims(message).is_some_and(|times| self.is_now(&times))
    }

    fn is_now(&self, times: &Times) -> bool {
        let since_epoch = self
            .clock
            .now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        let now = i64::try_from(since_epoch.as_secs()).unwrap_or(i64::MAX);
        times.nbf <= now && now < times.exp
    }
}

/// `exp` and `nbf` of `header.claims`. The header needs no look: the signature was HS256.
fn claims(message: &[u8]) -> Option<Times> {
    let dot = message.iter().position(|b| *b == b'.')?;
    let claims = URL_SAFE_NO_PAD.decode(&message[dot + 1..]).ok()?;
    serde_json::from_slice(&claims).ok()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime, UNIX_EPOCH};

    use super::*;

    const TOKEN: &str = "0123456789abcdef";
    const NOW: u64 = 1_800_000_000;

    struct At(u64);

    impl Clock for At {
        fn now(&self) -> SystemTime {
            UNIX_EPOCH + Duration::from_secs(self.0)
        }
    }

    fn tokens(text: &str) -> Result<ClientTokens, FileError> {
        ClientTokens::parse(text, Arc::new(At(NOW)))
    }

    fn jwt(key: &str, claims: &str) -> String {
        let [head, claims] =
            [r#"{"alg":"HS256","typ":"JWT"}"#, claims].map(|part| URL_SAFE_NO_PAD.encode(part));
        let message = format!("{head}.{claims}");
        let signature = hmac::sign(
            &hmac::Key::new(hmac::HMAC_SHA256, key.as_bytes()),
            message.as_bytes(),
        );
        format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature))
    }

    #[test]
    fn a_file_is_refused_by_line_and_never_quoted() {
        for (text, error) in [
            ("", "it holds no token"),
            ("# none\n\n", "it holds no token"),
            (
                "0123456789abcdef\nshort",
                "line 2: a token has at least 16 characters",
            ),
            ("name:short", "line 1: a token has at least 16 characters"),
        ] {
            assert_eq!(
                tokens(text).err().map(|e| e.to_string()).as_deref(),
                Some(error),
                "{text:?}"
            );
        }
    }

    #[test]
    fn a_token_is_shown_in_one_of_three_ways() {
        let good = format!(r#"{{"iss":"any","exp":{},"nbf":{}}}"#, NOW + 1, NOW);
        let over = format!(r#"{{"iss":"any","exp":{NOW},"nbf":{}}}"#, NOW - 5);
        let early = format!(r#"{{"iss":"any","exp":{},"nbf":{}}}"#, NOW + 9, NOW + 1);
        for (name, value, admitted) in [
            ("kling-proxy-token", TOKEN.to_owned(), true),
            ("kling-proxy-token", "0123456789abcdeF".to_owned(), false),
            ("kling-proxy-token", String::new(), false),
            ("authorization", format!("Bearer {TOKEN}"), true),
            ("authorization", TOKEN.to_owned(), false),
            ("authorization", format!("Basic {TOKEN}"), false),
            (
                "authorization",
                format!("Bearer {}", jwt(TOKEN, &good)),
                true,
            ),
            (
                "authorization",
                format!("Bearer {}", jwt("another key here", &good)),
                false,
            ),
            (
                "authorization",
                format!("Bearer {}", jwt(TOKEN, &over)),
                false,
            ),
            (
                "authorization",
                format!("Bearer {}", jwt(TOKEN, &early)),
                false,
            ),
            (
                "authorization",
                format!("Bearer {}", jwt(TOKEN, "{}")),
                false,
            ),
            ("x-token", TOKEN.to_owned(), false),
        ] {
            let headers = HeaderMap::from_iter([(name.parse().unwrap(), value.parse().unwrap())]);
            let tokens = tokens(&format!("someone:{TOKEN}")).unwrap();
            assert_eq!(tokens.admit(&headers), admitted, "{name}: {value}");
        }
    }
}
