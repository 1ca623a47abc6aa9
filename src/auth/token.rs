//! Bearer tokens for upstream: minted from a key pair, cached, and replaced before they expire.
//!
//! The vendor defines form and claims ("General Information", API authentication, read 2026-11-22):
//! HS256, header `alg` and `typ`, claims `iss`, `exp` and `nbf` as integers.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use http::HeaderValue;
use jsonwebtoken::crypto::{CryptoProvider, JwtSigner, KeyUtils};
use jsonwebtoken::errors::{Error as JwtError, ErrorKind};
use jsonwebtoken::signature::{self, Signer};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use ring::hmac;
use serde::Serialize;
use tokio::sync::Notify;
use zeroize::Zeroizing;

use crate::auth::secret::Secret;
use crate::clock::{Clock, Correction};
use crate::kling::api_path::Accepts;
use crate::telemetry::metrics::Metrics;

/// Credential by which upstream knows the account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credential {
    /// AccessKey and SecretKey, of which tokens are made that last half an hour by default.
    Pair {
        /// Names the account, as claim `iss` of the token.
        access_key: Secret,
        /// Key that signs the token with HMAC-SHA256.
        secret_key: Secret,
    },
    /// Static API key, which is sent unchanged.
    ApiKey(Secret),
}

/// Periods that set the claims of a token and the time of its replacement.
#[derive(Clone, Copy, Debug)]
pub struct Validity {
    /// Time from minting to `exp`.
    pub lifetime: Duration,
    /// Time from `nbf` to minting. It covers an upstream whose clock is behind ours.
    pub not_before_leeway: Duration,
    /// A token with less life left than this is replaced before use.
    ///
    /// Less than `lifetime`. It covers the time that a request takes to arrive, and an upstream
    /// whose clock is ahead of ours.
    pub refresh_before: Duration,
}

/// Claims of a token. Times are in seconds since the epoch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Claims {
    pub iss: String,
    /// Time at which the token expires.
    pub exp: u64,
    /// Time before which the token is not valid.
    pub nbf: u64,
}

/// Cache of the current bearer, which all requests use. A read of a fresh bearer takes no lock.
pub struct Tokens {
    source: Mutex<TokenSource>,
    clock: Arc<dyn Clock>,
    current: ArcSwapOption<Bearer>,
    /// Notified when upstream refuses the credential.
    refused: Notify,
    metrics: Arc<Metrics>,
}

/// Credential and periods that new tokens are made with.
struct TokenSource {
    credential: Credential,
    validity: Validity,
}

/// Failure to make a bearer.
#[derive(Debug, thiserror::Error)]
pub enum MintError {
    /// The claims could not be signed with the key.
    #[error("cannot sign a token")]
    Sign(#[source] JwtError),
    /// The credential has characters that an HTTP header cannot carry.
    #[error("the credential has characters that a header cannot carry")]
    NotAHeader,
}

/// Value of the `Authorization` header, with the clock correction that it was made by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authorization {
    /// Header value to send, which is marked sensitive.
    pub value: HeaderValue,
    /// Clock correction in force when the token was minted; `None` for an API key.
    pub minted_by: Option<Correction>,
}

/// `Authorization` value with the time in which it may be used.
struct Bearer {
    authorization: Authorization,
    /// Times of the token; `None` for an API key, which does not expire.
    times: Option<TokenTimes>,
}

/// Limits of a token's use, in seconds since the epoch.
#[derive(Clone, Copy)]
struct TokenTimes {
    nbf: u64,
    /// Time from which on the token is replaced before use.
    stale: u64,
    exp: u64,
}

// === impl Credential ===

impl Credential {
    /// Returns the kind of this credential, for messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Pair { .. } => "access key and secret key",
            Self::ApiKey(_) => "API key",
        }
    }

    /// Returns true for an API key, which Kling accepts on all paths.
    pub fn is_api_key(&self) -> bool {
        matches!(self, Self::ApiKey(_))
    }

    /// Returns true if both are key pairs that have exactly one key in common.
    fn shares_a_half(&self, other: &Self) -> bool {
        match (self, other) {
            (
                Self::Pair {
                    access_key,
                    secret_key,
                },
                Self::Pair {
                    access_key: other_access,
                    secret_key: other_secret,
                },
            ) => (access_key == other_access) != (secret_key == other_secret),
            _ => false,
        }
    }

    /// Returns true if a path takes this kind of credential. `accepted` is `None` for a path that takes none.
    fn is_accepted_by(&self, accepted: Option<Accepts>) -> bool {
        match accepted {
            Some(Accepts::Any) => true,
            Some(Accepts::ApiKey) => matches!(self, Self::ApiKey(_)),
            None => false,
        }
    }

    /// Makes the `Authorization` value of one request, marked sensitive. Nothing is cached.
    ///
    /// # Errors
    ///
    /// [`MintError`] if no token can be signed or the value does not fit into a header.
    pub fn authorization(
        &self,
        validity: Validity,
        now: SystemTime,
    ) -> Result<HeaderValue, MintError> {
        let bearer = self.bearer(validity, now, Correction::default())?;
        Ok(bearer.authorization.value)
    }

    fn bearer(
        &self,
        validity: Validity,
        now: SystemTime,
        correction: Correction,
    ) -> Result<Bearer, MintError> {
        let (token, times) = match self {
            Self::Pair {
                access_key,
                secret_key,
            } => {
                let claims = Claims::new(access_key, validity, now);
                let token = Zeroizing::new(sign(&claims, secret_key)?);
                let times = TokenTimes {
                    nbf: claims.nbf,
                    stale: claims.exp.saturating_sub(validity.refresh_before.as_secs()),
                    exp: claims.exp,
                };
                (token, Some(times))
            }
            Self::ApiKey(key) => (Zeroizing::new(key.expose().to_owned()), None),
        };
        // The header value owns these bytes without a copy. They are wiped when its last clone is dropped.
        let text = Zeroizing::new(format!("Bearer {}", *token).into_bytes());
        let text = Bytes::from_owner(text);
        let mut value = HeaderValue::from_maybe_shared(text).map_err(|_| MintError::NotAHeader)?;
        value.set_sensitive(true);
        let authorization = Authorization {
            value,
            minted_by: times.map(|_| correction),
        };
        Ok(Bearer {
            authorization,
            times,
        })
    }
}

// === impl Claims ===

impl Claims {
    /// Makes the claims of a token that is minted at `now`.
    pub fn new(access_key: &Secret, validity: Validity, now: SystemTime) -> Self {
        let now = unix_seconds(now);
        Self {
            iss: access_key.expose().to_owned(),
            exp: now + validity.lifetime.as_secs(),
            nbf: now.saturating_sub(validity.not_before_leeway.as_secs()),
        }
    }
}

// === impl Tokens ===

impl Tokens {
    /// Makes a cache without a token. The first use mints one.
    pub fn new(
        credential: Credential,
        validity: Validity,
        clock: Arc<dyn Clock>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let source = TokenSource {
            credential,
            validity,
        };
        Self {
            source: Mutex::new(source),
            clock,
            current: ArcSwapOption::empty(),
            refused: Notify::new(),
            metrics,
        }
    }

    /// Returns the bearer to send now, and mints a new one if the current one is missing or near its end.
    ///
    /// The token is checked against the wall clock at each use, because a machine that slept has missed every
    /// timer. A token minted under an earlier correction of the clock is replaced. One caller replaces a
    /// token that nears its end; the others send the current one meanwhile.
    ///
    /// # Errors
    ///
    /// [`MintError`] if a new token is needed and cannot be made.
    pub fn bearer(&self) -> Result<Authorization, MintError> {
        // The correction is read before the time. If it changes in between, the token is recorded under the
        // old correction, and the next use replaces it.
        let correction = self.clock.correction();
        let now = self.clock.now();
        let current = self.current.load();
        let current = current.as_deref().filter(|bearer| bearer.is_by(correction));
        let usable = match current {
            Some(bearer) if bearer.is_fresh(now) => return Ok(bearer.authorization.clone()),
            Some(bearer) if bearer.is_valid(now) => Some(bearer),
            _ => None,
        };
        let source = match (self.source.try_lock(), usable) {
            (Ok(source), _) => source,
            (Err(TryLockError::WouldBlock), Some(bearer)) => {
                return Ok(bearer.authorization.clone());
            }
            (Err(TryLockError::WouldBlock), None) => self.lock(),
            (Err(TryLockError::Poisoned(poisoned)), _) => poisoned.into_inner(),
        };
        // Another caller may have minted a token while this one waited for the lock.
        if let Some(bearer) = self.current.load().as_deref()
            && bearer.is_by(correction)
            && bearer.is_fresh(now)
        {
            return Ok(bearer.authorization.clone());
        }
        self.mint(&source, now, correction)
    }

    /// Uses another credential from now on, and drops the token of the old one. Returns true if the
    /// credential differs from the old one.
    pub fn replace(&self, credential: Credential) -> bool {
        let mut source = self.lock();
        let changed = source.credential != credential;
        if changed {
            source.credential = credential;
            self.current.store(None);
        }
        changed
    }

    /// Returns true if the current credential is an API key.
    pub fn has_api_key(&self) -> bool {
        self.lock().credential.is_api_key()
    }

    /// Returns true if a key pair has exactly one key in common with the current pair. Such a pair may have
    /// been read in the middle of a change.
    pub fn is_half_of(&self, credential: &Credential) -> bool {
        self.lock().credential.shares_a_half(credential)
    }

    /// Notes that upstream refused the credential, and ends the wait of [`refused`](Self::refused): a newer
    /// credential may be available. `on` is the kind of credential that the path takes. A refusal on a path
    /// that does not take ours proves nothing, and is ignored, because any client can request such a path.
    pub fn was_refused(&self, on: Option<Accepts>) {
        if self.lock().credential.is_accepted_by(on) {
            self.refused.notify_one();
        }
    }

    /// Waits until upstream refuses the credential.
    pub async fn refused(&self) {
        self.refused.notified().await;
    }

    /// Drops the current token, after upstream refused it as not yet valid or expired. Returns true if a new
    /// token can be minted, and false for an API key, which never changes.
    pub fn renew(&self) -> bool {
        let source = self.lock();
        self.current.store(None);
        matches!(source.credential, Credential::Pair { .. })
    }

    /// Mints tokens with these periods from now on, and drops the current token.
    pub fn set_validity(&self, validity: Validity) {
        self.lock().validity = validity;
        self.current.store(None);
    }

    fn mint(
        &self,
        source: &TokenSource,
        now: SystemTime,
        correction: Correction,
    ) -> Result<Authorization, MintError> {
        let TokenSource {
            credential,
            validity,
        } = source;
        let minted = credential.bearer(*validity, now, correction);
        self.metrics.token_minted(minted.is_ok());
        let bearer = minted?;
        if let Some(TokenTimes { exp, .. }) = bearer.times {
            self.metrics.token_expires(exp);
            tracing::debug!(exp, "token minted");
        }
        let authorization = bearer.authorization.clone();
        self.current.store(Some(Arc::new(bearer)));
        Ok(authorization)
    }

    fn lock(&self) -> MutexGuard<'_, TokenSource> {
        self.source.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Bearer ===

impl Bearer {
    /// Returns true if this bearer was made under this correction of the clock, or is an API key.
    fn is_by(&self, correction: Correction) -> bool {
        let minted_by = self.authorization.minted_by;
        minted_by.is_none_or(|minted_by| minted_by == correction)
    }

    fn is_valid(&self, now: SystemTime) -> bool {
        let now = unix_seconds(now);
        self.times
            .is_none_or(|times| times.nbf <= now && now < times.exp)
    }

    fn is_fresh(&self, now: SystemTime) -> bool {
        let now = unix_seconds(now);
        self.times
            .is_none_or(|times| times.nbf <= now && now < times.stale)
    }
}

/// Signs claims as HS256.
///
/// # Errors
///
/// [`MintError::Sign`] if the claims or the key cannot be used.
pub fn sign(claims: &Claims, secret_key: &Secret) -> Result<String, MintError> {
    // A second installation changes nothing. Its error means only that a provider is installed already.
    let _ = PROVIDER.install_default();
    let key = EncodingKey::from_secret(secret_key.expose().as_bytes());
    jsonwebtoken::encode(&Header::new(Algorithm::HS256), claims, &key).map_err(MintError::Sign)
}

fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

/// HMAC by ring, which rustls depends on anyway. jsonwebtoken's own backends are `rsa`, which has an open
/// advisory (RUSTSEC-2023-0071), and aws-lc-rs, which slows every start.
static PROVIDER: CryptoProvider = CryptoProvider {
    signer_factory: |algorithm, key| match algorithm {
        Algorithm::HS256 => Ok(Box::new(Hs256(hmac::Key::new(
            hmac::HMAC_SHA256,
            key.as_bytes(),
        )))),
        _ => Err(ErrorKind::InvalidAlgorithm.into()),
    },
    verifier_factory: |_, _| Err(ErrorKind::InvalidAlgorithm.into()),
    key_utils: KeyUtils::new_unimplemented(),
};

struct Hs256(hmac::Key);

impl Signer<Vec<u8>> for Hs256 {
    fn try_sign(&self, message: &[u8]) -> Result<Vec<u8>, signature::Error> {
        Ok(hmac::sign(&self.0, message).as_ref().to_vec())
    }
}

impl JwtSigner for Hs256 {
    fn algorithm(&self) -> Algorithm {
        Algorithm::HS256
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

    use base64::Engine;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;

    use super::*;

    const NOW: u64 = 1_800_000_000;
    const VALIDITY: Validity = Validity {
        lifetime: Duration::from_mins(30),
        not_before_leeway: Duration::from_secs(5),
        refresh_before: Duration::from_mins(5),
    };

    #[derive(Default)]
    struct Hand(AtomicU64, AtomicU32);

    impl Clock for Hand {
        fn now(&self) -> SystemTime {
            UNIX_EPOCH + Duration::from_secs(self.0.load(Relaxed))
        }

        fn correction(&self) -> Correction {
            Correction(self.1.load(Relaxed))
        }
    }

    fn pair(secret_key: &str) -> Credential {
        let [access_key, secret_key] =
            ["access", secret_key].map(|key| Secret::from(key.to_owned()));
        Credential::Pair {
            access_key,
            secret_key,
        }
    }

    fn tokens(credential: Credential) -> (Arc<Hand>, Tokens) {
        let clock = Arc::new(Hand(AtomicU64::new(NOW), AtomicU32::default()));
        let metrics = Arc::new(Metrics::new().unwrap());
        (
            Arc::clone(&clock),
            Tokens::new(credential, VALIDITY, clock, metrics),
        )
    }

    fn parts(bearer: &HeaderValue) -> [String; 2] {
        let jwt = bearer.to_str().unwrap().strip_prefix("Bearer ").unwrap();
        let parts: Vec<_> = jwt.split('.').collect();
        [parts[0], parts[1]]
            .map(|part| String::from_utf8(URL_SAFE_NO_PAD.decode(part).unwrap()).unwrap())
    }

    #[test]
    fn header_and_claims_are_exactly_those_of_the_vendor() {
        let (_, tokens) = tokens(pair("secret"));
        let [header, claims] = parts(&tokens.bearer().unwrap().value);
        assert_eq!(header, r#"{"typ":"JWT","alg":"HS256"}"#);
        assert_eq!(
            claims,
            r#"{"iss":"access","exp":1800001800,"nbf":1799999995}"#
        );
    }

    #[test]
    fn a_token_is_replaced_by_the_clock_at_use() {
        let (clock, tokens) = tokens(pair("secret"));
        let first = tokens.bearer().unwrap();
        for (now, same, why) in [
            (NOW + 1499, true, "more than refresh_before is left"),
            (NOW - 5, true, "the clock went back, but not before nbf"),
            (NOW + 1500, false, "refresh_before is left"),
            (NOW + 999_999, false, "the machine slept"),
            (NOW - 999_999, false, "the clock went back before nbf"),
        ] {
            clock.0.store(NOW, Relaxed);
            tokens.current.store(None);
            assert_eq!(tokens.bearer().unwrap(), first);
            clock.0.store(now, Relaxed);
            assert_eq!(tokens.bearer().unwrap() == first, same, "{why}");
        }
    }

    /// R40. A token must show the correction of the clock that it was minted by.
    #[test]
    fn a_token_by_another_correction_of_the_clock_is_replaced_and_says_so() {
        let (clock, tokens) = tokens(pair("secret"));
        for correction in [0, 1, 1, 2] {
            clock.1.store(correction, Relaxed);
            // By the time that the clock shows, the token of the round before would still be valid.
            let token = tokens.bearer().unwrap();
            assert_eq!(token.minted_by, Some(Correction(correction)));
        }
    }

    #[test]
    fn while_one_caller_replaces_it_others_use_a_valid_token_and_wait_for_an_expired_one() {
        let (clock, tokens) = tokens(pair("secret"));
        let first = tokens.bearer().unwrap();
        clock.0.store(NOW + 1600, Relaxed);
        std::thread::scope(|scope| {
            let minting = tokens.lock();
            assert_eq!(
                tokens.bearer().unwrap(),
                first,
                "still valid, so nobody waits"
            );
            clock.0.store(NOW + 1800, Relaxed);
            let waiting = scope.spawn(|| tokens.bearer().unwrap());
            drop(minting);
            assert_ne!(waiting.join().unwrap(), first, "expired, so it is not sent");
        });
    }

    #[test]
    fn another_credential_counts_at_once() {
        let (_, tokens) = tokens(pair("secret"));
        let first = tokens.bearer().unwrap();
        assert_eq!(
            (tokens.replace(pair("secret")), tokens.replace(pair("new"))),
            (false, true)
        );
        assert_ne!(tokens.bearer().unwrap(), first);
    }

    #[test]
    fn an_api_key_is_sent_as_it_is_and_nothing_shows_it() {
        let (_, tokens) = tokens(Credential::ApiKey(Secret::from("api-key".to_owned())));
        let Authorization { value, minted_by } = tokens.bearer().unwrap();
        assert_eq!(
            (value.as_bytes(), format!("{value:?}"), minted_by),
            (&b"Bearer api-key"[..], "Sensitive".to_owned(), None)
        );
    }
}
