//! Parameters of a create request, checked as Kling documents them.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::endpoints::{Endpoint, Output};
use super::fault::Fault;
use super::reply::Refusal;

/// Create request whose parameters are valid.
#[derive(Debug, Default)]
pub(super) struct CreateRequest {
    pub(super) external_id: Option<String>,
    /// Images to make, and slots held until the end of the task: `n` for images, the length for a series, 1
    /// for all else (Kling's page "Concurrency Rules", as quoted by `aself101/kling-api`, read 2026-11-22).
    pub(super) count: u32,
    pub(super) fault: Fault,
    /// Fields of the body that responses repeat.
    pub(super) echo: Map<String, Value>,
}

/// Longest external id, in characters. Kling documents no limit; this one limits the memory of the sandbox.
const LONGEST_EXTERNAL_ID: usize = 1024;

const IMAGE_COUNTS: RangeInclusive<u32> = 1..=9;

const SERIES_COUNTS: RangeInclusive<u32> = 2..=9;

/// Default of `series_amount`, and the number of images for `auto`.
const SERIES_COUNT: u32 = 4;

/// Fields that some response repeats.
const ECHOED: &[&str] = &[
    "element_description",
    "element_name",
    "frame_index",
    "model_name",
    "reference_type",
    "result_type",
    "session_id",
    "video_id",
    "video_url",
    "voice_name",
];

/// Longest text that a response repeats, in bytes.
const LONGEST_ECHO: usize = 1024;

// === impl CreateRequest ===

impl CreateRequest {
    /// Reads and checks the body of a create.
    ///
    /// # Errors
    ///
    /// 1200 if the body is no JSON object, 1201 if a value is missing or illegal.
    pub(super) fn parse(endpoint: &Endpoint, body: &[u8]) -> Result<Self, Refusal> {
        let body = object(body)?;
        for names in endpoint.required {
            require(&body, names)?;
        }
        for &(name, longest) in endpoint.limits {
            text(&body, name, longest)?;
        }
        for &(name, values) in endpoint.values {
            let value = at(&body, name).filter(|value| !value.is_null());
            if let Some(value) = value
                && !value.as_str().is_some_and(|text| values.contains(&text))
            {
                return Err(invalid(name, value));
            }
        }
        if let Some(name) = data_url(&body) {
            let message = format!("{name} must be Base64 without a data: prefix");
            return Err(Refusal::parameter(message));
        }
        let external_id = match endpoint.external_id {
            Some(name) => text(&body, name, LONGEST_EXTERNAL_ID)?,
            None => None,
        };
        Ok(Self {
            external_id: external_id.map(str::to_owned),
            count: count(endpoint.output, &body)?,
            fault: Fault::of(&body)?,
            echo: echo(&body),
        })
    }
}

/// Parses a body, which must be a JSON object.
///
/// # Errors
///
/// 1200 for anything else.
pub(super) fn object(body: &[u8]) -> Result<Value, Refusal> {
    let object = serde_json::from_slice::<Value>(body).ok();
    object
        .filter(Value::is_object)
        .ok_or_else(|| Refusal::new(1200, "The request body must be a JSON object"))
}

/// Refuses a value that is not documented. The message was measured for `settings.resolution`.
pub(super) fn invalid(name: &str, value: &Value) -> Refusal {
    let value = value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned);
    Refusal::parameter(format!("{name} value '{value}' is invalid"))
}

/// Returns the value at a path in the notation of [`Endpoint::required`].
pub(super) fn at<'a>(body: &'a Value, path: &str) -> Option<&'a Value> {
    path.split('.').try_fold(body, |value, step| match value {
        Value::Array(items) => match step.parse::<usize>() {
            Ok(index) => items.get(index),
            Err(_) => items.iter().find(|item| item["type"] == step),
        },
        value => value.get(step),
    })
}

fn require(body: &Value, names: &str) -> Result<(), Refusal> {
    let filled = |name: &&str| at(body, name).is_some_and(is_filled);
    let count = names.split(['|', '^']).filter(filled).count();
    if count == 0 {
        let names = names.replace(['|', '^'], " or ");
        return Err(Refusal::parameter(format!("{names} is missing or empty")));
    }
    if count > 1 && names.contains('^') {
        let names = names.replace('^', " and ");
        let message = format!("{names} cannot be used together");
        return Err(Refusal::parameter(message));
    }
    Ok(())
}

fn is_filled(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(_) | Value::Number(_) => true,
        Value::String(text) => !text.trim().is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
    }
}

/// Returns the name of the first image field with a `data:` URL, which Kling's pages call a mistake.
fn data_url(body: &Value) -> Option<&String> {
    let is_data_url = |value: &Value| value.as_str().is_some_and(|text| text.starts_with("data:"));
    let mut images = body.as_object()?.iter();
    images
        .find(|(name, value)| name.contains("image") && is_data_url(value))
        .map(|(name, _)| name)
}

/// Returns an optional text. An empty text counts as absent, as in Kling's examples.
fn text<'a>(body: &'a Value, name: &str, longest: usize) -> Result<Option<&'a str>, Refusal> {
    match at(body, name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if text.chars().count() > longest => Err(Refusal::parameter(
            format!("{name} cannot exceed {longest} characters"),
        )),
        Some(Value::String(text)) => Ok(Some(text.as_str()).filter(|text| !text.is_empty())),
        Some(_) => Err(Refusal::parameter(format!("{name} must be a string"))),
    }
}

fn count(output: Output, body: &Value) -> Result<u32, Refusal> {
    let (name, range, default) = match output {
        Output::Series if body["result_type"] == "series" => {
            ("series_amount", SERIES_COUNTS, SERIES_COUNT)
        }
        Output::Images | Output::Series => ("n", IMAGE_COUNTS, 1),
        _ => return Ok(1),
    };
    let value = &body[name];
    if value.is_null() || (name == "series_amount" && value == "auto") {
        return Ok(default);
    }
    let count = value.as_u64().and_then(|count| u32::try_from(count).ok());
    count
        .filter(|count| range.contains(count))
        .ok_or_else(|| invalid(name, value))
}

fn echo(body: &Value) -> Map<String, Value> {
    let is_short = |value: &&Value| match value {
        Value::String(text) => text.len() <= LONGEST_ECHO,
        value => value.is_number(),
    };
    let fields = ECHOED.iter().filter_map(|&name| {
        let value = body.get(name).filter(is_short)?;
        Some((name.to_owned(), value.clone()))
    });
    fields.collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::sandbox::endpoints::tests::endpoint;

    fn parse(path: &str, body: &Value) -> Result<CreateRequest, Refusal> {
        CreateRequest::parse(endpoint(path), body.to_string().as_bytes())
    }

    #[test]
    fn a_body_that_is_no_json_object_is_refused_with_1200() {
        for body in ["", "{", "[]", "\"a\"", "prompt=a"] {
            let refusal =
                CreateRequest::parse(endpoint("text2video"), body.as_bytes()).unwrap_err();
            assert_eq!(
                (refusal.status.as_u16(), refusal.code),
                (400, 1200),
                "{body}"
            );
        }
    }

    #[test]
    fn an_illegal_value_is_refused_with_1201_and_named() {
        let image = json!({ "type": "first_frame", "url": "AA" });
        for (path, body, message) in [
            (
                "text2video",
                json!({}),
                "prompt or multi_prompt is missing or empty",
            ),
            (
                "text2video",
                json!({"prompt": ""}),
                "prompt or multi_prompt is missing or empty",
            ),
            (
                "text2video",
                json!({"prompt": 7}),
                "prompt must be a string",
            ),
            (
                "text2video",
                json!({"prompt": "a".repeat(2501)}),
                "prompt cannot exceed 2500 characters",
            ),
            (
                "text2video",
                json!({"prompt": "a", "external_task_id": 7}),
                "external_task_id must be a string",
            ),
            ("generations", json!({"n": 1}), "prompt is missing or empty"),
            (
                "generations",
                json!({"prompt": "a", "n": 0}),
                "n value '0' is invalid",
            ),
            (
                "generations",
                json!({"prompt": "a", "n": 10}),
                "n value '10' is invalid",
            ),
            (
                "generations",
                json!({"prompt": "a", "n": "2"}),
                "n value '2' is invalid",
            ),
            (
                "generations",
                json!({"prompt": "a", "n": 2.0}),
                "n value '2.0' is invalid",
            ),
            (
                "omni-image",
                json!({"prompt": "a", "result_type": "series", "series_amount": 1}),
                "series_amount value '1' is invalid",
            ),
            (
                "videos/image2video",
                json!({"image": null}),
                "image or image_tail is missing or empty",
            ),
            (
                "videos/image2video",
                json!({"image": "data:image/png;base64,AA"}),
                "image must be Base64 without a data: prefix",
            ),
            (
                "multi-image2video",
                json!({"prompt": "a", "image_list": []}),
                "image_list is missing or empty",
            ),
            (
                "avatar/image2video",
                json!({"image": "AA", "audio_id": "1", "sound_file": "AA"}),
                "audio_id and sound_file cannot be used together",
            ),
            (
                "advanced-lip-sync",
                json!({"session_id": "1", "face_choose": [{}]}),
                "face_choose.0.face_id is missing or empty",
            ),
            (
                "/text-to-video/{model}",
                json!({"prompt": "a", "settings": {"resolution": "9000p"}}),
                "settings.resolution value '9000p' is invalid",
            ),
            (
                "/image-to-video/{model}",
                json!({"contents": [{"type": "prompt", "text": "a"}]}),
                "contents.first_frame.url is missing or empty",
            ),
            (
                "/image-to-video/{model}",
                json!({"contents": [image, {"type": "prompt", "text": "a".repeat(3073)}]}),
                "contents.prompt.text cannot exceed 3072 characters",
            ),
        ] {
            let refusal = parse(path, &body).unwrap_err();
            assert_eq!(refusal, Refusal::parameter(message), "{path} {body}");
        }
    }

    #[test]
    fn images_count_n_times_a_series_its_amount_and_all_else_once() {
        for (path, body, count) in [
            ("text2video", json!({"prompt": "a", "n": 3}), 1),
            ("videos/image2video", json!({"image_tail": "AA"}), 1),
            (
                "kolors-virtual-try-on",
                json!({"human_image": "AA", "n": 3}),
                1,
            ),
            ("generations", json!({"prompt": "a"}), 1),
            ("generations", json!({"prompt": "a", "n": null}), 1),
            ("generations", json!({"prompt": "a", "n": 9}), 9),
            (
                "omni-image",
                json!({"prompt": "a", "n": 2, "series_amount": 5}),
                2,
            ),
            (
                "omni-image",
                json!({"prompt": "a", "n": 2, "result_type": "series"}),
                4,
            ),
            (
                "omni-image",
                json!({"prompt": "a", "result_type": "series", "series_amount": 5}),
                5,
            ),
            (
                "omni-image",
                json!({"prompt": "a", "result_type": "series", "series_amount": "auto"}),
                4,
            ),
        ] {
            assert_eq!(parse(path, &body).unwrap().count, count, "{path} {body}");
        }
    }

    #[test]
    fn an_external_id_is_read_where_the_family_has_it() {
        let body = json!({
            "prompt": "a",
            "text": "a",
            "voice_id": "1",
            "voice_language": "en",
            "external_task_id": "mine",
            "options": { "external_task_id": "ours" },
        });
        for (path, external_id) in [
            ("text2video", Some("mine")),
            ("/text-to-video/{model}", Some("ours")),
            ("tts", None),
        ] {
            let request = parse(path, &body).unwrap();
            assert_eq!(request.external_id.as_deref(), external_id, "{path}");
        }
        let body = json!({ "prompt": "a", "external_task_id": "" });
        assert_eq!(parse("text2video", &body).unwrap().external_id, None);
    }

    #[test]
    fn what_comes_back_is_bounded() {
        let long = "a".repeat(LONGEST_ECHO + 1);
        let body =
            json!({ "prompt": "a", "model_name": "kling-v3", "video_url": long, "session_id": {} });
        let request = parse("text2video", &body).unwrap();
        assert_eq!(
            Value::Object(request.echo),
            json!({ "model_name": "kling-v3" })
        );
    }
}
