//! Who may call the proxy, where a file of client tokens says so (`access.client_tokens_file`).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::HeaderMap;
use http::header::AUTHORIZATION;
use ring::error::Unspecified;
use ring::hmac;
use ring::rand::{self, SystemRandom};
use serde::Deserialize;
use subtle::ConstantTimeEq;

use crate::clock::Clock;
use crate::headers::CLIENT_TOKEN;
use crate::secret::Secret;
use crate::secret_file::{self, SecretFileError};

/// The tokens that are accepted.
pub struct ClientTokens {
    clients: Vec<Client>,
    clock: Arc<dyn Clock>,
    /// What their owner should know.
    pub warning: Option<String>,
}

/// What a line of the file says.
#[derive(PartialEq, Eq)]
struct Client {
    name: ClientName,
    token: Secret,
}

/// The name of a token, for logs and metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientName(Arc<str>);

/// Shortest token accepted: less could be guessed.
const SHORTEST: usize = 16;
/// Longest name, in bytes: it is a label of metrics.
const LONGEST_NAME: usize = 64;
/// What a token without a name is called.
const UNNAMED: &str = "unnamed";

/// What is wrong with a file of tokens. It shows none of them.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be read, or others could have written it.
    #[error("cannot read {}", .0.display())]
    Unreadable(PathBuf, #[source] SecretFileError),
    /// It has no token.
    #[error("it holds no token")]
    Empty,
    /// A token is too short to be safe.
    #[error("line {0}: a token has at least {SHORTEST} characters")]
    Short(usize),
    /// A name would not be safe in a log.
    #[error("line {0}: a name has 1 to {LONGEST_NAME} letters, digits, `.`, `_` or `-`")]
    Name(usize),
}

#[derive(Deserialize)]
struct Times {
    exp: i64,
    nbf: i64,
}

// === impl ClientTokens ===

impl ClientTokens {
    /// Reads a file of tokens.
    ///
    /// # Errors
    ///
    /// [`FileError`] shows no token.
    pub fn read(path: &Path, clock: Arc<dyn Clock>) -> Result<Self, FileError> {
        let file = secret_file::read(path)
            .map_err(|error| FileError::Unreadable(path.to_owned(), error))?;
        let mut tokens = Self::parse(&file.text, clock)?;
        tokens.warning = file
            .exposed
            .then(|| format!("every user can read {}: chmod 600", path.display()));
        Ok(tokens)
    }

    /// One token that nobody can guess and that stands in no file: for a client that we start. It has
    /// the form of Kling's keys, 32 letters and digits.
    ///
    /// # Errors
    ///
    /// The system has no randomness.
    pub fn random(clock: Arc<dyn Clock>) -> Result<(Self, Secret), Unspecified> {
        let bytes: [u8; 16] = rand::generate(&SystemRandom::new())?.expose();
        let token = Secret::from(format!("{:032x}", u128::from_be_bytes(bytes)));
        let client = Client {
            name: ClientName(UNNAMED.into()),
            token: token.clone(),
        };
        let tokens = Self {
            clients: vec![client],
            clock,
            warning: None,
        };
        Ok((tokens, token))
    }

    /// Reads one token a line, `token` or `name:token`; empty lines and `#` comments do not count.
    ///
    /// # Errors
    ///
    /// [`FileError`] names the line.
    fn parse(text: &str, clock: Arc<dyn Clock>) -> Result<Self, FileError> {
        let mut clients = Vec::new();
        for (index, line) in text.lines().map(str::trim).enumerate() {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (name, token) = line
                .split_once(':')
                .map_or((UNNAMED, line), |(name, token)| (name.trim(), token.trim()));
            if token.len() < SHORTEST {
                return Err(FileError::Short(index + 1));
            }
            clients.push(Client {
                name: ClientName::new(name).ok_or(FileError::Name(index + 1))?,
                token: Secret::from(token.to_owned()),
            });
        }
        if clients.is_empty() {
            Err(FileError::Empty)
        } else {
            Ok(Self {
                clients,
                clock,
                warning: None,
            })
        }
    }

    /// Whose token the request shows: in `kling-proxy-token`, as a bearer, or as the secret key of a
    /// JWT, which is what an unchanged Kling client sends.
    pub fn admit(&self, headers: &HeaderMap) -> Option<ClientName> {
        let shown = headers.get(CLIENT_TOKEN).map(http::HeaderValue::as_bytes);
        let bearer = headers
            .get(AUTHORIZATION)
            .and_then(|value| value.as_bytes().split_at_checked("Bearer ".len()))
            .and_then(|(scheme, rest)| scheme.eq_ignore_ascii_case(b"Bearer ").then_some(rest));
        let client = shown
            .and_then(|shown| self.named_by(shown))
            .or_else(|| self.named_by(bearer?))
            .or_else(|| self.signer_of(bearer?));
        client.map(|client| client.name.clone())
    }

    /// Compares with every token, each in constant time, also after one was found.
    fn named_by(&self, shown: &[u8]) -> Option<&Client> {
        self.clients.iter().fold(None, |found, client| {
            let same = client.token.expose().as_bytes().ct_eq(shown);
            if same.into() { Some(client) } else { found }
        })
    }

    /// Whose token signs a JWT (HS256, `exp`, `nbf`) that is valid now.
    fn signer_of(&self, jwt: &[u8]) -> Option<&Client> {
        let dot = jwt.iter().rposition(|b| *b == b'.')?;
        let (message, signature) = (&jwt[..dot], &jwt[dot + 1..]);
        let signature = URL_SAFE_NO_PAD.decode(signature).ok()?;
        let signed = |client: &&Client| {
            let key = hmac::Key::new(hmac::HMAC_SHA256, client.token.expose().as_bytes());
            hmac::verify(&key, message, &signature).is_ok()
        };
        let client = self.clients.iter().find(signed)?;
        self.is_now(&claims(message)?).then_some(client)
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

impl PartialEq for ClientTokens {
    fn eq(&self, other: &Self) -> bool {
        self.clients == other.clients
    }
}

// === impl ClientName ===

impl ClientName {
    fn new(name: &str) -> Option<Self> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        let fits = (1..=LONGEST_NAME).contains(&name.len()) && name.bytes().all(plain);
        fits.then(|| Self(name.into()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
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
            (
                "a b:0123456789abcdef",
                "line 1: a name has 1 to 64 letters, digits, `.`, `_` or `-`",
            ),
            (
                ":0123456789abcdef",
                "line 1: a name has 1 to 64 letters, digits, `.`, `_` or `-`",
            ),
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
            let client = tokens.admit(&headers);
            let client = client.as_ref().map(ClientName::as_str);
            assert_eq!(client, admitted.then_some("someone"), "{name}: {value}");
        }
    }
}
