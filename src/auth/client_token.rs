//! Admits clients by their tokens, if a file of client tokens is set (`access.client_tokens_file`).

use std::borrow::{Borrow, Cow};
use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderName};
use ring::error::Unspecified;
use ring::hmac;
use ring::rand::{self, SystemRandom};
use serde::Deserialize;
use subtle::ConstantTimeEq;

use crate::auth::client_share::Share;
use crate::auth::secret::Secret;
use crate::auth::trusted_file::{self, TrustedFileError};
use crate::clock::Clock;

/// Header in which a client may send its token to the proxy.
pub const CLIENT_TOKEN: HeaderName = HeaderName::from_static("kling-proxy-token");

/// Tokens that the proxy accepts. The cost of the check of a request does not depend on their number.
pub struct ClientTokens {
    clients: Vec<Client>,
    /// Index in `clients` for the digest of each token.
    by_digest: HashMap<Digest, usize>,
    /// Indexes in `clients` of all clients with the same name.
    by_name: HashMap<ClientName, Vec<usize>>,
    /// Random key of the digests, so that nobody outside can predict the position of a token in the map.
    digests: hmac::Key,
    clock: Arc<dyn Clock>,
    /// Warning to show to the user: every user of this machine can read the file.
    pub warning: Option<String>,
}

/// HMAC-SHA256 of a token, with the key in `ClientTokens`.
type Digest = [u8; 32];

/// Client that the proxy admits, with its token.
pub struct Client {
    /// Name in logs and metrics. Several clients may have the same one.
    pub name: ClientName,
    token: Secret,
    /// Requests in flight of all clients with this name.
    pub share: Arc<Share>,
}

/// Name of a token, for logs and metrics.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ClientName(Arc<str>);

/// Length of the shortest token accepted, in bytes. A shorter one could be guessed.
const SHORTEST: usize = 16;
/// Longest token and longest JWT that is checked, in bytes. A JWT of a Kling client has 200 bytes.
const LONGEST: usize = 4096;
/// Largest number of tokens that are tried as the key of a JWT: of those whose name is its issuer, and again
/// of all tokens.
const MOST_KEYS: usize = 32;
/// Longest time until a client's JWT expires, in seconds. Kling's own clients make JWTs for 1,800 seconds.
const LONGEST_LIFE: i64 = 24 * 60 * 60;
/// Longest name, in bytes. It is limited because it becomes a label of metrics.
const LONGEST_NAME: usize = 64;
/// Name of all tokens that have no name in the file.
const UNNAMED: &str = "unnamed";

/// Reason why a file of tokens cannot be used. Its text contains no token.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file cannot be read, or others could have written it.
    #[error("cannot read {}", .0.display())]
    Unreadable(PathBuf, #[source] TrustedFileError),
    /// The file contains no token.
    #[error("it holds no token")]
    Empty,
    /// A token is too short to be safe, or too long. The value is its line.
    #[error("line {0}: a token has {SHORTEST} to {LONGEST} characters")]
    Length(usize),
    /// The content changed between one reading and the next, several times.
    #[error("it is still being written")]
    Unsettled,
    /// A name is empty, too long, or not safe in a log. The value is its line.
    #[error("line {0}: a name has 1 to {LONGEST_NAME} letters, digits, `.`, `_` or `-`")]
    Name(usize),
    /// The system has no random bytes for the key of the digests.
    #[error("the system has no randomness")]
    Randomness,
}

/// JWT that an unchanged Kling client makes, with its token as the secret key.
struct Jwt<'a> {
    /// Claim `iss`: the text that is set as AccessKey in the client.
    issuer: Option<String>,
    /// Time from `nbf` to `exp`, in seconds since the epoch.
    valid: Range<i64>,
    /// Signed part of the JWT: header and claims, as sent.
    message: &'a [u8],
    signature: Vec<u8>,
}

#[derive(Deserialize)]
struct Header<'a> {
    #[serde(borrow)]
    alg: Cow<'a, str>,
}

#[derive(Deserialize)]
struct ClientClaims {
    iss: Option<String>,
    exp: i64,
    nbf: i64,
}

// === impl ClientTokens ===

impl ClientTokens {
    /// Reads a file of tokens.
    ///
    /// # Errors
    ///
    /// [`FileError`], whose text contains no token.
    pub fn read(path: &Path, clock: Arc<dyn Clock>) -> Result<Self, FileError> {
        let unreadable = |error| FileError::Unreadable(path.to_owned(), error);
        let file = trusted_file::read(path).map_err(unreadable)?;
        let mut tokens = Self::parse(file.text().map_err(unreadable)?, clock)?;
        tokens.warning = file
            .exposed
            .then(|| format!("every user can read {}: chmod 600", path.display()));
        Ok(tokens)
    }

    /// Makes one random token that is in no file, for a client that we start. It has the form of Kling's
    /// keys: 32 letters and digits.
    ///
    /// # Errors
    ///
    /// [`Unspecified`] if the system has no random bytes.
    pub fn random(clock: Arc<dyn Clock>) -> Result<(Self, Secret), Unspecified> {
        let bytes: [u8; 16] = rand::generate(&SystemRandom::new())?.expose();
        let token = Secret::from(format!("{:032x}", u128::from_be_bytes(bytes)));
        let client = (ClientName(UNNAMED.into()), token.clone());
        Ok((Self::new(vec![client], clock)?, token))
    }

    fn new(tokens: Vec<(ClientName, Secret)>, clock: Arc<dyn Clock>) -> Result<Self, Unspecified> {
        let digests = hmac::Key::generate(hmac::HMAC_SHA256, &SystemRandom::new())?;
        let mut clients: Vec<Client> = Vec::new();
        let mut by_name: HashMap<ClientName, Vec<usize>> = HashMap::new();
        let mut by_digest = HashMap::new();
        for (index, (name, token)) in tokens.into_iter().enumerate() {
            by_digest.insert(digest(&digests, token.expose().as_bytes()), index);
            let namesakes = by_name.entry(name.clone()).or_default();
            let share = match namesakes.first() {
                Some(first) => Arc::clone(&clients[*first].share),
                None => Arc::new(Share::of(name.as_str())),
            };
            namesakes.push(index);
            clients.push(Client { name, token, share });
        }
        Ok(Self {
            clients,
            by_digest,
            by_name,
            digests,
            clock,
            warning: None,
        })
    }

    /// Returns these tokens with the shares that clients of the same name have in `before`, so that their
    /// requests in flight still count.
    #[must_use]
    pub fn after(mut self, before: &Self) -> Self {
        for client in &mut self.clients {
            let namesakes = before.by_name.get(&client.name);
            let first = namesakes.and_then(|namesakes| before.clients.get(*namesakes.first()?));
            if let Some(first) = first {
                client.share = Arc::clone(&first.share);
            }
        }
        self
    }

    /// Makes an empty list of tokens, which admits no client.
    pub fn none(clock: Arc<dyn Clock>) -> Self {
        Self {
            clients: Vec::new(),
            by_digest: HashMap::new(),
            by_name: HashMap::new(),
            digests: hmac::Key::new(hmac::HMAC_SHA256, &[]),
            clock,
            warning: None,
        }
    }

    /// Returns true if no client is admitted.
    pub fn is_none(&self) -> bool {
        self.clients.is_empty()
    }

    /// Parses one token per line, `token` or `name:token`. Empty lines and lines that begin with `#` are
    /// ignored.
    ///
    /// # Errors
    ///
    /// [`FileError`], which names the line of a wrong token or name.
    pub fn parse(text: &str, clock: Arc<dyn Clock>) -> Result<Self, FileError> {
        let mut tokens = Vec::new();
        for (index, line) in text.lines().map(str::trim).enumerate() {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (name, token) = line
                .split_once(':')
                .map_or((UNNAMED, line), |(name, token)| (name.trim(), token.trim()));
            if !(SHORTEST..=LONGEST).contains(&token.len()) {
                return Err(FileError::Length(index + 1));
            }
            let name = ClientName::new(name).ok_or(FileError::Name(index + 1))?;
            tokens.push((name, Secret::from(token.to_owned())));
        }
        if tokens.is_empty() {
            return Err(FileError::Empty);
        }
        Self::new(tokens, clock).map_err(|Unspecified| FileError::Randomness)
    }

    /// Finds the client whose token a request shows: in `kling-proxy-token`, as a bearer, or as the secret
    /// key of a JWT. An unchanged Kling client sends such a JWT.
    pub fn admit(&self, headers: &HeaderMap) -> Option<&Client> {
        let shown = headers.get(CLIENT_TOKEN).map(http::HeaderValue::as_bytes);
        let bearer = headers
            .get(AUTHORIZATION)
            .and_then(|value| value.as_bytes().split_at_checked("Bearer ".len()))
            .and_then(|(scheme, rest)| scheme.eq_ignore_ascii_case(b"Bearer ").then_some(rest));
        shown
            .and_then(|shown| self.named_by(shown))
            .or_else(|| self.named_by(bearer?))
            .or_else(|| self.signer_of(bearer?))
    }

    /// Finds the client of a token by the token's digest, and compares the token in constant time.
    fn named_by(&self, shown: &[u8]) -> Option<&Client> {
        if shown.len() > LONGEST {
            return None;
        }
        let index = *self.by_digest.get(&digest(&self.digests, shown))?;
        let client = self.clients.get(index)?;
        let same = client.token.expose().as_bytes().ct_eq(shown);
        bool::from(same).then_some(client)
    }

    /// Finds the client whose token is the key of a JWT, if the JWT is valid now. Tries the tokens whose name
    /// is the JWT's issuer, then the first tokens of the file, at most [`MOST_KEYS`] of each.
    fn signer_of(&self, jwt: &[u8]) -> Option<&Client> {
        let jwt = Jwt::parse(jwt).filter(|jwt| self.is_now(&jwt.valid))?;
        let named = jwt
            .issuer
            .as_deref()
            .and_then(|name| self.by_name.get(name));
        let named = named.into_iter().flatten().take(MOST_KEYS);
        let named = named.filter_map(|index| self.clients.get(*index));
        let mut likely = named.chain(self.clients.iter().take(MOST_KEYS));
        likely.find(|client| jwt.is_signed_by(&client.token))
    }

    fn is_now(&self, valid: &Range<i64>) -> bool {
        let since_epoch = self
            .clock
            .now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        let now = i64::try_from(since_epoch.as_secs()).unwrap_or(i64::MAX);
        valid.contains(&now) && valid.end <= now.saturating_add(LONGEST_LIFE)
    }
}

impl PartialEq for ClientTokens {
    fn eq(&self, other: &Self) -> bool {
        let tokens = |clients: &'_ [Client]| -> Vec<_> {
            let token = |client: &Client| (client.name.clone(), client.token.clone());
            clients.iter().map(token).collect()
        };
        tokens(&self.clients) == tokens(&other.clients)
    }
}

// === impl ClientName ===

impl ClientName {
    fn new(name: &str) -> Option<Self> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        let fits = (1..=LONGEST_NAME).contains(&name.len()) && name.bytes().all(plain);
        fits.then(|| Self(name.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for ClientName {
    fn borrow(&self) -> &str {
        self.as_str()
    }
}

// === impl Jwt ===

impl<'a> Jwt<'a> {
    /// Parses a well-formed JWT whose header names HS256. The signature is not verified here.
    fn parse(text: &'a [u8]) -> Option<Self> {
        if text.len() > LONGEST {
            return None;
        }
        let mut dots = (0..text.len()).filter(|index| text[*index] == b'.');
        let (first, second) = (dots.next()?, dots.next()?);
        let part = |range: Range<usize>| URL_SAFE_NO_PAD.decode(&text[range]).ok();
        let header = part(0..first)?;
        let header: Header = serde_json::from_slice(&header).ok()?;
        if header.alg != "HS256" {
            return None;
        }
        let ClientClaims { iss, exp, nbf } =
            serde_json::from_slice(&part(first + 1..second)?).ok()?;
        Some(Self {
            issuer: iss,
            valid: nbf..exp,
            message: &text[..second],
            signature: part(second + 1..text.len())?,
        })
    }

    fn is_signed_by(&self, token: &Secret) -> bool {
        let key = hmac::Key::new(hmac::HMAC_SHA256, token.expose().as_bytes());
        hmac::verify(&key, self.message, &self.signature).is_ok()
    }
}

fn digest(key: &hmac::Key, token: &[u8]) -> Digest {
    let mut digest = Digest::default();
    digest.copy_from_slice(hmac::sign(key, token).as_ref());
    digest
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime, UNIX_EPOCH};

    use tokio::time::Instant;

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
        jwt_with(r#"{"alg":"HS256","typ":"JWT"}"#, key, claims)
    }

    fn jwt_with(head: &str, key: &str, claims: &str) -> String {
        let [head, claims] = [head, claims].map(|part| URL_SAFE_NO_PAD.encode(part));
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
                "line 2: a token has 16 to 4096 characters",
            ),
            ("name:short", "line 1: a token has 16 to 4096 characters"),
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
        let day = 24 * 60 * 60;
        let long = format!(r#"{{"exp":{},"nbf":{NOW}}}"#, NOW + day);
        let longer = format!(r#"{{"exp":{},"nbf":{NOW}}}"#, NOW + day + 1);
        let padding = "x".repeat(LONGEST);
        let padded = format!(r#"{{"iss":"{padding}","exp":{},"nbf":{NOW}}}"#, NOW + 1);
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
            (
                "authorization",
                format!("Bearer {}.x", jwt(TOKEN, &good)),
                false,
            ),
            (
                "authorization",
                format!("Bearer {}", jwt(TOKEN, &long)),
                true,
            ),
            (
                "authorization",
                format!("Bearer {}", jwt(TOKEN, &longer)),
                false,
            ),
            (
                "authorization",
                format!("Bearer {}", jwt_with(r#"{"alg":"none"}"#, TOKEN, &good)),
                false,
            ),
            (
                "authorization",
                format!("Bearer {}", jwt_with(r#"{"alg":"HS512"}"#, TOKEN, &good)),
                false,
            ),
            (
                "authorization",
                format!("Bearer {}", jwt_with(r#"{"typ":"JWT"}"#, TOKEN, &good)),
                false,
            ),
            (
                "authorization",
                format!("Bearer {}", jwt(TOKEN, &padded)),
                false,
            ),
        ] {
            let headers = HeaderMap::from_iter([(name.parse().unwrap(), value.parse().unwrap())]);
            let tokens = tokens(&format!("someone:{TOKEN}")).unwrap();
            let client = tokens.admit(&headers);
            let client = client.map(|client| client.name.as_str());
            assert_eq!(client, admitted.then_some("someone"), "{name}: {value}");
        }
    }

    /// R37. An unknown token must not cost more time if the file has more tokens.
    #[test]
    fn what_a_token_costs_does_not_depend_on_how_many_there_are() {
        let line = |index| format!("client-{index}:token-of-client-{index}\n");
        let claims =
            |issuer: &str| format!(r#"{{"iss":"{issuer}","exp":{},"nbf":{NOW}}}"#, NOW + 9);
        let shown = [
            "nobody's token of any length".to_owned(),
            jwt("nobody's token", &claims("nobody")),
            jwt("nobody's token", &claims("client-3")),
        ];
        let shown = shown.map(|bearer| {
            let bearer = format!("Bearer {bearer}").parse().unwrap();
            HeaderMap::from_iter([(AUTHORIZATION, bearer)])
        });
        let cost = |clients: u32| {
            let tokens = tokens(&(0..clients).map(line).collect::<String>()).unwrap();
            let ask = |_| {
                let begun = Instant::now();
                for headers in &shown {
                    assert!(tokens.admit(headers).is_none());
                }
                begun.elapsed()
            };
            // The quickest of many runs is the cost itself; other work of the machine only adds to it.
            (0..50).map(ask).min().unwrap()
        };
        let (few, many) = (cost(50), cost(5_000));
        assert!(many < 10 * few, "{few:?} for 50 tokens, {many:?} for 5,000");
    }

    #[test]
    fn of_many_tokens_the_issuer_of_a_jwt_names_its_own() {
        let line = |index| format!("client-{index}:token-of-client-{index}\n");
        let tokens = tokens(&(0..5_000).map(line).collect::<String>()).unwrap();
        for (issuer, signer, admitted) in [
            ("client-4711", "token-of-client-4711", true),
            ("client-4711", "token-of-client-4712", false),
            ("an AccessKey", "token-of-client-31", true),
            ("client-4711", "token-of-client-31", true),
            ("an AccessKey", "token-of-client-32", false),
        ] {
            let claims = format!(r#"{{"iss":"{issuer}","exp":{},"nbf":{NOW}}}"#, NOW + 9);
            let signed = tokens.signer_of(jwt(signer, &claims).as_bytes());
            assert_eq!(signed.is_some(), admitted, "{issuer}: {signer}");
        }
    }
}
