//! `kling-proxy token`: prints a fresh token for other tools, or its claims.

use std::time::{Duration, UNIX_EPOCH};

use super::{Exit, Failure, SettingsArgs, complain, find_credential, say};
use crate::auth::credentials::Places;
use crate::auth::token::{self, Claims, Credential};
use crate::clock::{Clock, SystemClock};
use crate::environment::Environment;

/// Number of characters of an access key that are shown.
const SHOWN: usize = 4;

pub(super) fn run(
    decode: bool,
    args: &SettingsArgs,
    environment: &Environment,
) -> Result<(), Failure> {
    let (settings, _) = args.load(environment)?;
    let found = find_credential(&Places {
        environment,
        configured: &settings.credentials,
    })?;
    found.warnings.iter().for_each(complain);
    let Credential::Pair {
        access_key,
        secret_key,
    } = &found.credential
    else {
        let reason = format!(
            "{} is an API key, which is sent as it is: no token",
            found.source
        );
        return Err(Failure::new(Exit::Failed, reason));
    };
    let now = SystemClock.now();
    let claims = Claims::new(access_key, settings.token, now);
    if !decode {
        let token = token::sign(&claims, secret_key);
        say(token.map_err(|error| Failure::because(Exit::Failed, &error))?);
        return Ok(());
    }
    let time =
        |seconds| humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(seconds));
    let shown: String = claims.iss.chars().take(SHOWN).collect();
    say(format_args!("issuer       {shown}… (the access key, iss)"));
    say(format_args!(
        "valid from   {} (nbf {})",
        time(claims.nbf),
        claims.nbf
    ));
    say(format_args!(
        "valid until  {} (exp {})",
        time(claims.exp),
        claims.exp
    ));
    say("signed with  the secret key, HS256");
    Ok(())
}
