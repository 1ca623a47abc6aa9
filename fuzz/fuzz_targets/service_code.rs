//! Fuzzes the responses of upstream: the reader of service codes agrees with a plain parse of the whole
//! text, the beginning of a text never contradicts the whole, and the client's response is well formed.

#![no_main]

use std::sync::{Arc, LazyLock};

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use futures_util::FutureExt;
use http_body_util::BodyExt;
use kling_proxy::internals::{
    Answer, Envelope, Error, ErrorBodyFormat, ErrorFormat, Metrics, NormaliseLayer, Peek,
    ProxyRequest, Reloadable, StatusMapping, envelope,
};
use libfuzzer_sys::fuzz_target;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;
use tower::{Layer, ServiceExt, service_fn};

static METRICS: LazyLock<Arc<Metrics>> = LazyLock::new(|| Metrics::new().expect("metrics").into());

/// Places at which a longer text is cut.
const CUTS: usize = 64;

fuzz_target!(|text: &[u8]| {
    let readable = String::from_utf8_lossy(text);
    let json = readable.strip_prefix('\u{feff}').unwrap_or(&readable);
    if let (Ok(members), Ok(codes)) = (serde_json::from_str(json), serde_json::from_str(json)) {
        agrees_with(&members, &codes, text);
    }
    for cut in (0..=text.len()).step_by(text.len() / CUTS + 1) {
        beginning_agrees(&text[..cut], text);
    }
    if let Some(envelope) = envelope::read(text)
        && envelope.code != 0
    {
        answer_is_well_formed(envelope, text.len());
    }
});

/// All members of an object in their order, including duplicates.
struct Members<T>(Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Members<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Members(Vec::new()))
    }
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for Members<T> {
    type Value = Self;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Self, A::Error> {
        while let Some(member) = map.next_entry()? {
            self.0.push(member);
        }
        Ok(self)
    }
}

fn agrees_with(
    Members(members): &Members<Value>,
    Members(letters): &Members<Box<RawValue>>,
    text: &[u8],
) {
    let named = |wanted: &str| {
        let values = members.iter().filter(|(name, _)| name == wanted);
        values.map(|(_, value)| value).collect::<Vec<_>>()
    };
    let code = match named("code").first() {
        // Compared as text, because a float does not hold every integer.
        Some(Value::Number(_)) => {
            let letters = letters.iter().find(|(name, _)| name == "code");
            letters.and_then(|(_, number)| {
                let number = number.get();
                let whole = number.trim_end_matches('0').strip_suffix('.');
                whole.unwrap_or(number).parse().ok()
            })
        }
        Some(Value::String(text)) if text.trim().chars().all(|c| c.is_ascii_digit()) => {
            text.trim().parse().ok()
        }
        _ => None,
    };
    let read = envelope::read(text);
    assert_eq!(read.as_ref().map(|read| read.code), code);
    let Some(read) = read else { return };

    for (text, name) in [(&read.message, "message"), (&read.request_id, "request_id")] {
        let kept = match (text, named(name).last()) {
            (None, None | Some(Value::Null)) => true,
            (Some(text), Some(Value::String(said))) => text == said,
            // A value that is no string is kept as its JSON text.
            (Some(text), Some(said)) => {
                serde_json::from_str(text).is_ok_and(|text: Value| text == **said)
            }
            _ => false,
        };
        assert!(kept, "{name}: {text:?}");
    }
    let data = named("data").last().filter(|data| !data.is_null()).copied();
    let kept = read.data.map(|data| serde_json::from_str(data.get()));
    assert_eq!(kept.transpose().expect("data is JSON").as_ref(), data);
}

fn beginning_agrees(beginning: &[u8], text: &[u8]) {
    let (peeked, whole) = (envelope::peek(text), envelope::read(text));
    let whole = whole.map(|whole| whole.code);
    let is_code = |code| {
        assert!([Peek::Undecided, Peek::Code(code)].contains(&peeked));
        assert!(whole.is_none_or(|whole| whole == code));
    };
    match envelope::peek(beginning) {
        Peek::Undecided => {}
        Peek::Code(code) => is_code(code),
        Peek::NoEnvelope => {
            assert!(!matches!(peeked, Peek::Code(_)));
            assert_eq!(whole, None);
        }
    }
    if let Some(read) = envelope::read_beginning(beginning) {
        is_code(read.code);
    }
}

/// Members of our body that the envelope decides.
#[derive(Deserialize)]
struct Told {
    code: i64,
    message: String,
    request_id: String,
    data: Option<Box<RawValue>>,
    error: Detail,
}

#[derive(Deserialize)]
struct Detail {
    r#type: String,
    source: String,
}

fn answer_is_well_formed(envelope: Envelope, size: usize) {
    let said = (
        envelope.code,
        envelope.message.clone(),
        envelope.request_id.clone(),
        envelope.data.as_ref().map(ToString::to_string),
    );
    let error = Error::Service {
        answer: Answer::boxed(Response::new(Body::empty())),
        envelope,
    };
    let layer = NormaliseLayer::new(Reloadable::new(ErrorFormat {
        statuses: StatusMapping::Documented,
        format: ErrorBodyFormat::Kling,
    }));
    let mut error = Some(error);
    let failing = service_fn(move |_: ProxyRequest| {
        let error = error.take().expect("one request");
        async { Err::<Response, _>(error) }
    });
    let request = ProxyRequest::untraced(Request::default(), &METRICS);
    let own_id = request.context.id().as_str().to_owned();
    let answer = layer.layer(failing).oneshot(request);
    let Ok(response) = answer.now_or_never().expect("it waits for nothing");
    let (head, body) = response.into_parts();
    let body = body.collect().now_or_never().expect("it is all there");
    let body = body.expect("it is all there").to_bytes();

    // An escape in JSON takes up to six characters for one. The texts of the code table come on top.
    assert!(body.len() <= 6 * size + 2048);
    let told: Told = serde_json::from_slice(&body).expect("our body is JSON");
    let (code, message, request_id, data) = said;
    assert_eq!(told.code, code);
    assert!(message.is_none_or(|message| told.message == message));
    assert_eq!(told.request_id, request_id.unwrap_or(own_id));
    assert_eq!(told.data.map(|data| data.to_string()), data);
    assert_eq!(told.error.source, "upstream");
    assert_eq!(head.headers["kling-proxy-error"], told.error.r#type);
    assert!(head.status.is_client_error() || head.status.is_server_error());
}
