//! Every request carries one valid credential, ours: the upstream of all tests judges each.

use std::{collections::BTreeSet, thread};

use serde_json::json;

use crate::support::{
    ACCESS_KEY, Connection, Credential, Message, SECRET_KEY, Upstream, claims, get, mint, now,
    started, started_with,
};

/// `exp` and `nbf` as upstream saw them last.
fn times(upstream: &Upstream) -> [u64; 2] {
    let claims = claims(upstream.last().header("authorization").unwrap());
    ["exp", "nbf"].map(|name| claims[name].as_u64().unwrap())
}

fn tokens(upstream: &Upstream) -> BTreeSet<String> {
    let requests = upstream.seen().requests.into_iter();
    requests
        .map(|request| request.header("authorization").unwrap().to_owned())
        .collect()
}

#[test]
fn upstream_of_these_tests_accepts_one_valid_token_only() {
    let header = json!({ "alg": "HS256", "typ": "JWT" });
    let claims = |from: u64, to: u64| json!({ "iss": ACCESS_KEY, "exp": to, "nbf": from });
    let valid = claims(now(), now() + 60);
    let mut with_iat = valid.clone();
    with_iat["iat"] = json!(1);
    for (accepted, header, claims, secret_key) in [
        (true, &header, &valid, SECRET_KEY),
        (false, &header, &valid, ACCESS_KEY),
        (false, &header, &with_iat, SECRET_KEY),
        (false, &header, &claims(0, now()), SECRET_KEY),
        (false, &header, &claims(now() + 60, now() + 90), SECRET_KEY),
        (
            false,
            &json!({ "alg": "HS384", "typ": "JWT" }),
            &valid,
            SECRET_KEY,
        ),
        (false, &json!({ "alg": "HS256" }), &valid, SECRET_KEY),
    ] {
        let authorization = format!("authorization: Bearer {}", mint(header, claims, secret_key));
        let pair = Credential::Pair(ACCESS_KEY, SECRET_KEY);
        for (accepted, head) in [
            (accepted, authorization.clone()),
            (false, authorization.replace("Bearer", "bearer")),
            (false, format!("{authorization}\r\n{authorization}")),
            (false, String::new()),
        ] {
            let head = format!("GET /v1/x HTTP/1.1\r\n{head}\r\n\r\n");
            let verdict = pair.judge(&Message {
                head,
                ..Message::default()
            });
            assert_eq!(verdict.is_ok(), accepted, "{header} {claims}: {verdict:?}");
        }
    }
}

#[test]
fn token_lives_for_half_an_hour_and_began_five_seconds_ago() {
    let before = now();
    let (upstream, proxy) = started();
    proxy.get("/v1/videos/text2video/1");
    let [exp, nbf] = times(&upstream);
    assert_eq!(exp - nbf, 1805);
    assert!((before..=now()).contains(&(exp - 1800)), "{exp}");
}

#[test]
fn lifetime_and_leeway_of_a_token_are_settings() {
    let (upstream, proxy) = started_with(&[
        ("token.lifetime", "10m"),
        ("token.not_before_leeway", "20s"),
    ]);
    proxy.get("/v1/x");
    let [exp, nbf] = times(&upstream);
    assert_eq!(exp - nbf, 620);
}

#[test]
fn token_is_kept_until_it_is_due() {
    let (upstream, proxy) = started();
    for _ in 0..20 {
        proxy.get("/v1/x");
    }
    assert_eq!(tokens(&upstream).len(), 1);
}

#[test]
fn no_request_of_ten_thousand_over_two_refreshes_lacks_a_valid_token() {
    // A token is replaced when it has less than 58 of its 60 seconds left: every two or three.
    let (upstream, proxy) =
        started_with(&[("token.lifetime", "1m"), ("token.refresh_before", "58s")]);
    let address = proxy.address;
    let five_hundred = || {
        let mut connection = Connection::to(address);
        for _ in 0..500 {
            assert_eq!(connection.send(get("/v1/x")).answer().status(), 200);
        }
    };
    let mut sent = 0;
    while sent < 10_000 || tokens(&upstream).len() < 3 {
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(five_hundred);
            }
        });
        sent += 2_000;
    }
    assert_eq!(upstream.seen().requests.len(), sent);
}
