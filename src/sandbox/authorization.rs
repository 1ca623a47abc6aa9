//! Verifies the token of a request as strictly as the documentation allows.
//!
//! Every literal here is the sandbox's own: a constant shared with the code that mints tokens would hide a
//! mistake in it. Only the table of credentials that each path accepts is shared.

use axum::http::{HeaderMap, header::AUTHORIZATION};
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use ring::hmac;
use serde_json::{Map, Value};

use super::reply::Refusal;
use super::{ACCESS_KEY, API_KEY, SECRET_KEY};
use crate::kling::api_path::Accepts;

/// Longest time that `exp` may lie ahead, in seconds: the 30 minutes of Kling's sample code.
const LONGEST_LIFE: u64 = 1800;

/// Seconds by which `exp` may exceed [`LONGEST_LIFE`], because no two clocks agree.
const TOLERANCE: u64 = 30;

/// Message of the real API for any other credential on a path that accepts an API key only (measured by
/// `aself101/kling-api`, 2026).
const NO_KEY_PAIRS: &str = "Authentication error. The current API does not support AK/SK; please go to the \
    console (https://kling.ai/dev/api-key) to create API key.";

/// Checks the single `Authorization` of a request to `path`. `now` is in seconds since the epoch.
///
/// # Errors
///
/// 1000 to 1004. Times are checked last, and `nbf` before `exp`, so that a client whose clock is wrong can
/// see that from the code.
pub(super) fn verify(path: &str, headers: &HeaderMap, now: u64) -> Result<(), Refusal> {
    let credential = credential(headers)?;
    if credential == API_KEY {
        return Ok(());
    }
    if Accepts::of(path) == Some(Accepts::ApiKey) {
        return Err(Refusal::new(1002, NO_KEY_PAIRS));
    }
    let claims = signed_claims(credential)?;
    let (Some(exp), Some(nbf)) = (integer(&claims, "exp"), integer(&claims, "nbf")) else {
        return Err(Refusal::new(
            1002,
            "The claims exp and nbf must be whole seconds",
        ));
    };
    if nbf > now {
        Err(Refusal::documented(1003))
    } else if exp <= now {
        Err(Refusal::documented(1004))
    } else if exp - now > LONGEST_LIFE + TOLERANCE {
        Err(Refusal::new(
            1002,
            "The token expires more than 30 minutes ahead",
        ))
    } else {
        Ok(())
    }
}

/// Returns the credential after `Bearer `.
fn credential(headers: &HeaderMap) -> Result<&str, Refusal> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let first = values.next().ok_or_else(|| Refusal::documented(1001))?;
    if values.next().is_some() {
        return Err(Refusal::new(1002, "More than one Authorization"));
    }
    if first.as_bytes().trim_ascii().is_empty() {
        return Err(Refusal::documented(1001));
    }
    let credential = first
        .to_str()
        .ok()
        .and_then(|value| value.strip_prefix("Bearer "));
    credential.ok_or_else(|| Refusal::documented(1002))
}

/// Returns the claims of a token that is well-formed, has our issuer and is signed with our key.
fn signed_claims(token: &str) -> Result<Map<String, Value>, Refusal> {
    let parts: Vec<&str> = token.split('.').collect();
    let &[header, payload, signature] = parts.as_slice() else {
        // Measured: Kling counts 0 parts in a text without any dot.
        let count = if parts.len() == 1 { 0 } else { parts.len() };
        let message = format!("The token was expected to have 3 parts, but got {count}");
        return Err(Refusal::new(1002, message));
    };
    let malformed = || Refusal::new(1002, "The token is not a valid JWT");
    let algorithm = object(header).ok_or_else(malformed)?.remove("alg");
    if algorithm != Some(Value::from("HS256")) {
        return Err(Refusal::new(1002, "The token must be signed with HS256"));
    }
    let claims = object(payload).ok_or_else(malformed)?;
    let signature = BASE64_URL_SAFE_NO_PAD
        .decode(signature)
        .map_err(|_| malformed())?;
    let Some(issuer) = claims.get("iss").and_then(Value::as_str) else {
        return Err(Refusal::new(1002, "The claim iss must be a string"));
    };
    if issuer != ACCESS_KEY {
        return Err(Refusal::new(1000, "access key not found"));
    }
    let signed = &token[..=header.len() + payload.len()];
    let key = hmac::Key::new(hmac::HMAC_SHA256, SECRET_KEY.as_bytes());
    hmac::verify(&key, signed.as_bytes(), &signature)
        .map_err(|_| Refusal::new(1000, "signature is invalid"))?;
    Ok(claims)
}

fn object(part: &str) -> Option<Map<String, Value>> {
    serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(part).ok()?).ok()
}

/// Returns a whole number, or `None`, also for a fraction or for a string of digits.
fn integer(claims: &Map<String, Value>, name: &str) -> Option<u64> {
    claims.get(name)?.as_u64()
}

#[cfg(test)]
pub(super) mod tests {
    use axum::http::HeaderValue;
    use serde_json::json;

    use super::*;

    pub(in crate::sandbox) const NOW: u64 = 1_800_000_000;

    fn claims() -> Value {
        json!({ "iss": ACCESS_KEY, "exp": NOW + 1800, "nbf": NOW - 5 })
    }

    fn token(header: &Value, claims: &Value, key: &str) -> String {
        let encode = |part: &Value| BASE64_URL_SAFE_NO_PAD.encode(part.to_string());
        let signed = format!("{}.{}", encode(header), encode(claims));
        let key = hmac::Key::new(hmac::HMAC_SHA256, key.as_bytes());
        let signature = hmac::sign(&key, signed.as_bytes());
        format!("{signed}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))
    }

    /// Returns a token that is valid at `NOW`.
    pub(in crate::sandbox) fn good() -> String {
        token(
            &json!({ "alg": "HS256", "typ": "JWT" }),
            &claims(),
            SECRET_KEY,
        )
    }

    /// Returns the code of the refusal, or 0 if there is none.
    fn verdict_at(path: &str, values: &[&str], now: u64) -> u16 {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(AUTHORIZATION, HeaderValue::from_str(value).unwrap());
        }
        verify(path, &headers, now).map_or_else(|refusal| refusal.code, |()| 0)
    }

    fn verdict(values: &[&str]) -> u16 {
        verdict_at("/v1/videos/text2video", values, NOW)
    }

    fn verdict_on(claims: &Value) -> u16 {
        let token = token(&json!({ "alg": "HS256" }), claims, SECRET_KEY);
        verdict(&[&format!("Bearer {token}")])
    }

    #[test]
    fn a_token_as_documented_is_accepted() {
        assert_eq!(verdict(&[&format!("Bearer {}", good())]), 0);
    }

    #[test]
    fn a_missing_or_empty_authorization_is_refused_with_1001() {
        for values in [&[][..], &[""], &["  "]] {
            assert_eq!(verdict(values), 1001, "{values:?}");
        }
    }

    #[test]
    fn a_malformed_authorization_is_refused_with_1002() {
        let good = good();
        let (unsigned, _) = good.rsplit_once('.').unwrap();
        for value in [
            good.clone(),
            format!("bearer {good}"),
            format!("Bearer  {good}"),
            format!("Bearer\t{good}"),
            format!("Bearer {good} "),
            format!("Bearer {good}="),
            format!("Bearer {good}.{good}"),
            format!("Bearer {unsigned}"),
            "Bearer".to_owned(),
            "Bearer ".to_owned(),
            "Bearer api-key".to_owned(),
            "Bearer a.b.c".to_owned(),
            "Basic YTpi".to_owned(),
        ] {
            assert_eq!(verdict(&[&value]), 1002, "{value:?}");
        }
    }

    #[test]
    fn two_authorizations_are_refused_with_1002() {
        let good = format!("Bearer {}", good());
        for values in [[good.as_str(), &good], ["", &good], [&good, ""]] {
            assert_eq!(verdict(&values), 1002, "{values:?}");
        }
    }

    #[test]
    fn a_token_without_parts_is_refused_in_the_measured_words() {
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, HeaderValue::from_static("Bearer api-key"));
        let refusal = verify("/account/costs", &headers, NOW).unwrap_err();
        assert_eq!(
            refusal.message,
            "The token was expected to have 3 parts, but got 0"
        );
    }

    #[test]
    fn another_algorithm_than_hs256_is_refused_with_1002() {
        for header in [
            json!({ "alg": "none" }),
            json!({ "alg": "HS384" }),
            json!({ "alg": "RS256" }),
            json!({ "alg": "hs256" }),
            json!({ "alg": ["HS256"] }),
            json!({ "typ": "JWT" }),
            json!(["HS256"]),
        ] {
            let token = token(&header, &claims(), SECRET_KEY);
            assert_eq!(verdict(&[&format!("Bearer {token}")]), 1002, "{header}");
        }
    }

    #[test]
    fn a_claim_that_is_missing_or_of_the_wrong_type_is_refused_with_1002() {
        for name in ["iss", "exp", "nbf"] {
            let mut missing = claims();
            missing.as_object_mut().unwrap().remove(name);
            assert_eq!(verdict_on(&missing), 1002, "{missing}");
            for wrong in [
                json!(null),
                json!(1.5),
                json!(1_799_999_999.0),
                json!(-1),
                json!([]),
            ] {
                let mut claims = claims();
                claims[name] = wrong;
                assert_eq!(verdict_on(&claims), 1002, "{claims}");
            }
        }
        for name in ["exp", "nbf"] {
            let mut claims = claims();
            claims[name] = json!(claims[name].to_string());
            assert_eq!(verdict_on(&claims), 1002, "{claims}");
        }
        assert_eq!(verdict_on(&json!([ACCESS_KEY, NOW + 1800, NOW - 5])), 1002);
    }

    #[test]
    fn an_unknown_issuer_is_refused_with_1000() {
        for issuer in ["", "someone", SECRET_KEY] {
            let mut claims = claims();
            claims["iss"] = json!(issuer);
            assert_eq!(verdict_on(&claims), 1000, "{issuer:?}");
        }
    }

    #[test]
    fn a_token_signed_with_another_key_is_refused_with_1000() {
        let header = json!({ "alg": "HS256" });
        for key in ["", ACCESS_KEY, "another"] {
            let token = token(&header, &claims(), key);
            assert_eq!(verdict(&[&format!("Bearer {token}")]), 1000, "{key:?}");
        }
        let good = good();
        let (unsigned, _) = good.rsplit_once('.').unwrap();
        assert_eq!(verdict(&[&format!("Bearer {unsigned}.")]), 1000);
    }

    #[test]
    fn times_are_judged_to_the_second_but_for_the_tolerance_of_the_lifetime() {
        for (nbf, exp, code) in [
            (NOW, NOW + 1, 0),
            (NOW + 1, NOW + 1800, 1003),
            (NOW - 5, NOW, 1004),
            (NOW - 5, 0, 1004),
            (0, NOW + 1830, 0),
            (0, NOW + 1831, 1002),
            (0, u64::MAX, 1002),
            // A client whose clock is ahead must see that from the code.
            (NOW + 600, NOW + 2405, 1003),
        ] {
            let claims = json!({ "iss": ACCESS_KEY, "exp": exp, "nbf": nbf });
            assert_eq!(verdict_on(&claims), code, "{claims}");
        }
    }

    #[test]
    fn a_path_of_the_new_standard_takes_the_api_key_only_which_is_good_for_every_path() {
        let good = format!("Bearer {}", good());
        let key = format!("Bearer {API_KEY}");
        for (path, values, code) in [
            ("/text-to-video/kling-2.6", &[good.as_str()][..], 1002),
            ("/text-to-video/kling-2.6", &[&key], 0),
            ("/tasks", &[&good], 1002),
            ("/tasks", &[&key, &key], 1002),
            ("/solutions/talking_agent", &["Bearer api-key"], 1002),
            ("/solutions/talking_agent", &[&key], 0),
            ("/v1/videos/text2video", &[&key], 0),
            ("/account/costs", &[&key], 0),
            ("/tasks", &[], 1001),
            ("/tasks2", &[&good], 0),
            ("/account/costs", &[&good], 0),
        ] {
            assert_eq!(verdict_at(path, values, NOW), code, "{path} {values:?}");
        }
    }
}
