//! Who may call the proxy, where a file of client tokens says so (`access.client_tokens_file`).

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

/// The header in which a client may show its token to the proxy.
pub const CLIENT_TOKEN: HeaderName = HeaderName::from_static("kling-proxy-token");

/// The tokens that are accepted. What a request costs here does not depend on how many there are.
pub struct ClientTokens {
    clients: Vec<Client>,
    /// Which client a token belongs to, by its digest.
    by_digest: HashMap<Digest, usize>,
    /// Which clients have a name.
    by_name: HashMap<ClientName, Vec<usize>>,
    /// Makes the digests, so that nobody outside knows where in the map a token leads.
    digests: hmac::Key,
    clock: Arc<dyn Clock>,
    /// What their owner should know.
    pub warning: Option<String>,
}

/// HMAC-SHA256 of a token.
type Digest = [u8; 32];

/// Who may call.
pub struct Client {
    /// What it is called in logs and metrics; several may have one name.
    pub name: ClientName,
    token: Secret,
    /// What all clients of this name have in flight.
    pub share: Arc<Share>,
}

/// The name of a token, for logs and metrics.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ClientName(Arc<str>);

/// Shortest token accepted: less could be guessed.
const SHORTEST: usize = 16;
/// Longest token and longest JWT that is looked at, in bytes. A JWT of a Kling client has 200.
const LONGEST: usize = 4096;
/// As many tokens are tried for the key of a JWT.
const MOST_KEYS: usize = 32;
/// A client's JWT ends at most so many seconds from now. Kling's own clients make theirs for 1,800.
const LONGEST_LIFE: i64 = 24 * 60 * 60;
/// Longest name, in bytes: it is a label of metrics.
const LONGEST_NAME: usize = 64;
/// What a token without a name is called.
const UNNAMED: &str = "unnamed";

/// What is wrong with a file of tokens. It shows none of them.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be read, or others could have written it.
    #[error("cannot read {}", .0.display())]
    Unreadable(PathBuf, #[source] TrustedFileError),
    /// It has no token.
    #[error("it holds no token")]
    Empty,
    /// A token is too short to be safe, or too long to be one.
    #[error("line {0}: a token has {SHORTEST} to {LONGEST} characters")]
    Length(usize),
    /// It was written again and again while it was read.
    #[error("it is still being written")]
    Unsettled,
    /// A name would not be safe in a log.
    #[error("line {0}: a name has 1 to {LONGEST_NAME} letters, digits, `.`, `_` or `-`")]
    Name(usize),
    /// The system has no randomness for the digests.
    #[error("the system has no randomness")]
    Randomness,
}

/// A JWT as an unchanged Kling client makes it.
struct Jwt<'a> {
    /// The issuer: what the client has for an AccessKey.
    issuer: Option<String>,
    /// From when on and until when it is valid, in seconds since the epoch.
    valid: Range<i64>,
    /// What is signed.
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
    /// [`FileError`] shows no token.
    pub fn read(path: &Path, clock: Arc<dyn Clock>) -> Result<Self, FileError> {
        let unreadable = |error| FileError::Unreadable(path.to_owned(), error);
        let file = trusted_file::read(path).map_err(unreadable)?;
        let mut tokens = Self::parse(file.text().map_err(unreadable)?, clock)?;
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

    /// The same, where clients keep what they have in flight by the tokens before.
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

    /// No token: nobody is admitted.
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

    /// Returns true if nobody is admitted.
    pub fn is_none(&self) -> bool {
        self.clients.is_empty()
    }

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

    /// Whose token the request shows: in `kling-proxy-token`, as a bearer, or as the secret key of a
    /// JWT, which is what an unchanged Kling client sends.
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

    /// Whose token this is: found by its digest, and compared in constant time.
    fn named_by(&self, shown: &[u8]) -> Option<&Client> {
        if shown.len() > LONGEST {
            return None;
        }
        let index = *self.by_digest.get(&digest(&self.digests, shown))?;
        let client = self.clients.get(index)?;
        let same = client.token.expose().as_bytes().ct_eq(shown);
        bool::from(same).then_some(client)
    }

    /// Whose token signs a JWT that is valid now: one of those that have its issuer for a name, or one of
    /// the first.
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

    /// The name as text.
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
    /// Reads what is well formed and says that it is signed by HS256. Nobody vouches for it yet.
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

    /// R37.
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
            // The quickest of many is what it costs; what else the machine does only adds to that.
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
