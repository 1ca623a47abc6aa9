//! Judges the account by Kling's response to the credential, and advises on what to correct.

use serde::Deserialize;

use super::account::{ApiResponse, Credentials};
use super::network::Target;
use super::region;
use super::report::{Fault, Finding, StepResult};
use crate::auth::token::Credential;
use crate::cli::Exit;
use crate::kling::service_code::{Class, Needs};

/// Part of the response to `GET /account/costs` that is read in addition to the service code.
#[derive(Deserialize)]
struct Costs {
    #[serde(rename = "resource_pack_subscribe_infos", default)]
    packs: Vec<Pack>,
}

#[derive(Deserialize)]
struct Pack {
    status: String,
}

/// Decides if the account exists and can be used. If Kling does not know a key pair, asks its other hosts.
pub(super) async fn judge(
    answer: &ApiResponse,
    target: &Target,
    credentials: &Credentials,
) -> StepResult {
    let row = answer.row();
    let text = format!("{} {}: {}", answer.envelope.code, row.kind, answer.message);
    let refused =
        |r#type, advice: &str| Err(Fault::new(Exit::Refused, r#type, text.clone(), advice));
    let needs = row.needs(&answer.message);
    match (row.class, &credentials.credential) {
        (Class::Success, credential) => Ok(known(answer, credential)),
        (_, Credential::Pair { .. }) if needs == Some(Needs::ApiKey) => refused(
            "api_key_needed",
            "access key and secret key are not taken here: make an API key in Kling's console and \
             set KLING_API_KEY",
        ),
        (_, Credential::ApiKey(_)) if needs == Some(Needs::KeyPair) => refused(
            "key_pair_needed",
            "what is set as API key is none: if it is an access key or a secret key, set both, as \
             KLING_ACCESS_KEY and KLING_SECRET_KEY; else copy the API key again",
        ),
        (Class::Credential | Class::CredentialMissing, Credential::ApiKey(_)) => refused(
            row.kind,
            "see in Kling's console that the API key is whole and has not been deleted, and that \
             upstream.url is the region that issued it; it was not sent anywhere else",
        ),
        (Class::Credential, Credential::Pair { .. }) => {
            Err(region::find(&text, row.kind, target, credentials).await)
        }
        (Class::CredentialMissing | Class::TokenTime, _) => refused(row.kind, row.solution),
        _ => Err(Fault::new(Exit::Failed, row.kind, text, row.solution)),
    }
}

/// Describes a credential that Kling knows, and warns if none of its resource packs is left.
fn known(answer: &ApiResponse, credential: &Credential) -> Finding {
    let data = answer.envelope.data.as_ref();
    let costs = data.and_then(|data| serde_json::from_str::<Costs>(data.get()).ok());
    let packs = costs.map_or_else(Vec::new, |costs| costs.packs);
    let used_up = |pack: &&Pack| ["expired", "runOut"].contains(&pack.status.as_str());
    let usable = packs.len() - packs.iter().filter(used_up).count();
    let mut text = format!("upstream knows the {}", credential.kind());
    if !packs.is_empty() {
        text = format!(
            "{text}; {usable} of {} resource packs are left",
            packs.len()
        );
    }
    let mut found = Finding::new((), text);
    if usable == 0 && !packs.is_empty() {
        found.warn(
            "resource_pack_depleted",
            "creates will be refused with 1102, unless the account pays afterwards: purchase a \
             resource pack",
        );
    }
    found
}
