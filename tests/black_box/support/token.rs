//! Tokens as Kling documents them, in literals of our own. They check what the proxy signs.

use std::time::SystemTime;

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD as BASE64};
use ring::hmac::{self, HMAC_SHA256};
use serde_json::{Value, json};

use super::Message;

pub const ACCESS_KEY: &str = "AccessKeyOfTheBlackBoxTests00001";
pub const SECRET_KEY: &str = "SecretKeyOfTheBlackBoxTests00001";
/// Text that every JWT begins with.
pub const TOKEN: &str = "eyJ";

/// Credential that an upstream accepts.
#[derive(Clone, Copy, Debug)]
pub enum Credential {
    Pair(&'static str, &'static str),
    ApiKey(&'static str),
    /// Anything or nothing: the test itself checks.
    Any,
}

// === impl Credential ===

impl Credential {
    /// Checks the `Authorization` of a request, or returns what is wrong with it.
    pub fn judge(self, request: &Message) -> Result<(), String> {
        let values = request.values("authorization");
        let token = || {
            let [authorization] = values[..] else {
                return Err(format!("want one Authorization, got {}", values.len()));
            };
            let token = authorization.strip_prefix("Bearer ");
            token.ok_or("want the prefix `Bearer `".to_owned())
        };
        match self {
            Self::Any => Ok(()),
            Self::Pair(access_key, secret_key) => verify(token()?, access_key, secret_key),
            Self::ApiKey(key) => match token()? {
                token if token == key => Ok(()),
                token => Err(format!("want the key {key}, got {token}")),
            },
        }
    }
}

/// Checks algorithm, signature, the exact set of claims, and that the token is valid now.
pub fn verify(token: &str, access_key: &str, secret_key: &str) -> Result<(), String> {
    let parts: Vec<_> = token.split('.').collect();
    let [header, payload, signature] = parts[..] else {
        return Err(format!("want three parts, got {}", parts.len()));
    };
    if decode(header)? != json!({ "alg": "HS256", "typ": "JWT" }) {
        return Err(format!("wrong header {}", decode(header)?));
    }
    let key = hmac::Key::new(HMAC_SHA256, secret_key.as_bytes());
    let signature = BASE64
        .decode(signature)
        .map_err(|error| error.to_string())?;
    let signed = format!("{header}.{payload}");
    hmac::verify(&key, signed.as_bytes(), &signature).map_err(|_| "wrong signature")?;
    let claims = decode(payload)?;
    let (exp, nbf) = (claims["exp"].as_u64(), claims["nbf"].as_u64());
    if claims != json!({ "iss": access_key, "exp": exp, "nbf": nbf }) {
        return Err(format!(
            "want iss, and whole seconds in exp and nbf, got {claims}"
        ));
    }
    if exp <= Some(now()) || nbf > Some(now()) {
        return Err(format!("not valid at {}: {claims}", now()));
    }
    Ok(())
}

/// Returns the claims of a token or of an `Authorization` value.
pub fn claims(token: &str) -> Value {
    decode(token.split('.').nth(1).expect("a token")).unwrap()
}

/// Mints a token. It signs by HMAC-SHA-256, even if the header has another algorithm.
pub fn mint(header: &Value, claims: &Value, secret_key: &str) -> String {
    let encode = |part: &Value| BASE64.encode(part.to_string());
    let signed = format!("{}.{}", encode(header), encode(claims));
    let key = hmac::Key::new(HMAC_SHA256, secret_key.as_bytes());
    let signature = BASE64.encode(hmac::sign(&key, signed.as_bytes()));
    format!("{signed}.{signature}")
}

/// Returns the seconds since 1970.
pub fn now() -> u64 {
    SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs()
}

fn decode(part: &str) -> Result<Value, String> {
    let bytes = BASE64.decode(part).map_err(|error| error.to_string())?;
    serde_json::from_slice(&bytes).map_err(|error| error.to_string())
}
