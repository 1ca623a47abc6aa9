//! Asks Kling's other regions for a key pair that one region refused. Never asks for an API key, because
//! that would send the key itself.

use std::time::Duration;

use super::account::{self, Credentials};
use super::network::Target;
use super::report::Fault;
use crate::auth::token::Validity;
use crate::cli::Exit;
use crate::upstream::Origin;

/// Kling's API hosts. Hosts of a single region come first.
const HOSTS: [&str; 3] = [
    "https://api-singapore.klingai.com",
    "https://api-beijing.klingai.com",
    "https://api.klingai.com",
];
/// Lifetime of the tokens that are sent to the other hosts.
const LIFETIME: Duration = Duration::from_mins(1);

/// Result of a search for a key pair at the other hosts.
#[derive(Debug, PartialEq, Eq)]
struct Tried {
    /// First host that knows the key pair.
    known_by: Option<Origin>,
    unreachable: Vec<Origin>,
}

/// Describes why a key pair was refused. If one of Kling's hosts refused it, asks the others, of which one
/// may know it.
pub(super) async fn find(
    text: &str,
    kind: &'static str,
    target: &Target,
    credentials: &Credentials,
) -> Fault {
    let others = others(&target.origin);
    if others.is_empty() {
        let advice = "copy access key and secret key again, both whole, and see that upstream.url \
                      is where they come from";
        return Fault::new(Exit::Refused, kind, text, advice);
    }
    let Tried {
        known_by,
        unreachable,
    } = ask_all(&others, target, credentials).await;
    if let Some(host) = known_by {
        let text = format!("{text}; {host} knows the pair");
        let advice = format!("set upstream.url = \"{host}\"");
        return Fault::new(Exit::Refused, "wrong_region", text, advice);
    }
    let mut text = format!("{text}; none of Kling's other hosts knows the pair");
    for host in unreachable {
        text = format!("{text}, but {host} could not be asked");
    }
    let advice = "the secret key or the access key is wrong or was deleted: copy both again from \
                  Kling's console";
    Fault::new(Exit::Refused, kind, text, advice)
}

/// Returns Kling's other hosts; none if `origin` is not a host of Kling's, because a refusal there does not
/// concern Kling.
fn others(origin: &Origin) -> Vec<Origin> {
    let hosts = HOSTS.iter().filter_map(|host| host.parse::<Origin>().ok());
    let is_own = |host: &Origin| host.to_string().eq_ignore_ascii_case(&origin.to_string());
    let (own, others): (Vec<_>, Vec<_>) = hosts.partition(is_own);
    if own.is_empty() { Vec::new() } else { others }
}

/// Asks the hosts one after the other, until one knows the key pair.
async fn ask_all(others: &[Origin], target: &Target, credentials: &Credentials) -> Tried {
    let credentials = Credentials {
        validity: Validity {
            lifetime: LIFETIME,
            ..credentials.validity
        },
        ..credentials.clone()
    };
    let mut unreachable = Vec::new();
    for other in others {
        let target = Target {
            origin: other.clone(),
            ..target.clone()
        };
        match ask(&target, &credentials).await {
            Ok(true) => {
                return Tried {
                    known_by: Some(other.clone()),
                    unreachable,
                };
            }
            Ok(false) => {}
            Err(_) => unreachable.push(other.clone()),
        }
    }
    Tried {
        known_by: None,
        unreachable,
    }
}

/// Returns true if a host knows the key pair, even if it refuses the request for another reason.
async fn ask(target: &Target, credentials: &Credentials) -> Result<bool, Fault> {
    let answer = account::ask(target, credentials).await?.value;
    Ok(!answer.row().class.refuses_token())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use base64::Engine;
    use base64::prelude::BASE64_URL_SAFE_NO_PAD;
    use rustls::RootCertStore;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio::sync::mpsc;

    use super::*;
    use crate::auth::secret::Secret;
    use crate::auth::token::Credential;
    use crate::clock::SystemClock;
    use crate::upstream::Timeouts;

    /// Serves one request with this service code, and sends the text of the request to `told`.
    async fn host(code: i64, told: mpsc::UnboundedSender<String>) -> Origin {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let origin = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                request.push(stream.read_u8().await.unwrap());
            }
            told.send(String::from_utf8(request).unwrap()).unwrap();
            let body = format!("{{\"code\":{code}}}");
            let length = body.len();
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{body}");
            stream.write_all(answer.as_bytes()).await.unwrap();
        });
        origin.parse().unwrap()
    }

    fn target(origin: Origin) -> Target {
        let timeout = Duration::from_secs(20);
        Target {
            egress: None,
            origin,
            roots: Arc::new(RootCertStore::empty()),
            timeouts: Timeouts {
                connect: timeout,
                response: timeout,
                idle: timeout,
            },
        }
    }

    fn credentials() -> Credentials {
        let [access_key, secret_key] = ["access", "secret"].map(|key| Secret::from(key.to_owned()));
        Credentials {
            credential: Credential::Pair {
                access_key,
                secret_key,
            },
            validity: Validity {
                lifetime: Duration::from_mins(30),
                not_before_leeway: Duration::from_secs(5),
                refresh_before: Duration::from_mins(5),
            },
            clock: Arc::new(SystemClock),
        }
    }

    #[test]
    fn only_who_uses_a_host_of_kling_is_helped_to_another() {
        let texts = |url: &str| -> Vec<_> {
            let others = others(&url.parse().unwrap());
            others.iter().map(Origin::to_string).collect()
        };
        let [singapore, beijing, old] = HOSTS;
        assert_eq!(texts(singapore), [beijing, old]);
        assert_eq!(texts("https://API-Beijing.klingai.com"), [singapore, old]);
        for url in [
            "https://kling.example.test",
            "https://api.klingai.com.evil.test",
            "https://api.klingai.com:8443",
            "http://127.0.0.1:5548",
        ] {
            assert_eq!(texts(url), [""; 0], "{url}");
        }
    }

    #[tokio::test]
    async fn the_first_host_that_knows_the_pair_is_named() {
        let (told, mut requests) = mpsc::unbounded_channel();
        let gone: Origin = "http://127.0.0.1:1".parse().unwrap();
        let ignorant = host(1000, told.clone()).await;
        let knowing = host(1102, told.clone()).await;
        let untried = host(0, told).await;
        let others = [gone.clone(), ignorant, knowing.clone(), untried.clone()];
        let tried = ask_all(&others, &target(untried), &credentials()).await;
        let expected = Tried {
            known_by: Some(knowing),
            unreachable: vec![gone],
        };
        assert_eq!(tried, expected);
        for _ in 0..2 {
            let request = requests.try_recv().unwrap();
            let (_, token) = request.split_once("Bearer ").unwrap();
            let claims = BASE64_URL_SAFE_NO_PAD.decode(token.split('.').nth(1).unwrap());
            let claims: serde_json::Value = serde_json::from_slice(&claims.unwrap()).unwrap();
            let [exp, nbf] = ["exp", "nbf"].map(|name| claims[name].as_u64().unwrap());
            assert_eq!(exp - nbf, 60 + 5, "a minute, and the leeway");
        }
        assert!(requests.try_recv().is_err(), "nobody else is asked");
    }
}
