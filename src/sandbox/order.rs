//! What a create asks for, checked as Kling documents it.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::reply::Refusal;
use super::trigger::Trigger;

/// A resource of the legacy API that makes tasks.
#[derive(Debug)]
pub(super) struct Family {
    pub(super) path: &'static str,
    pub(super) output: Output,
    /// Of each group one field at least must be there and not empty.
    required: &'static [&'static [&'static str]],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Output {
    Video,
    Images,
}

/// A create whose parameters are in order.
#[derive(Debug)]
pub(super) struct Order {
    pub(super) external_id: Option<String>,
    /// Results to make, and slots held until they are: `n` for images, 1 for a video
    /// (vendor's page "Concurrency Rules", as quoted by `aself101/kling-api`, read 2026-11-22).
    pub(super) count: usize,
    pub(super) trigger: Trigger,
}

/// The legacy families that most clients use, with what the vendor's pages call required
/// (as quoted by public mirrors, read 2026-11-22).
pub(super) const FAMILIES: &[Family] = &[
    Family {
        path: "/v1/videos/text2video",
        output: Output::Video,
        required: &[&["prompt", "multi_prompt"]],
    },
    Family {
        path: "/v1/videos/image2video",
        output: Output::Video,
        required: &[&["image", "image_tail"]],
    },
    Family {
        path: "/v1/videos/multi-image2video",
        output: Output::Video,
        required: &[&["image_list"], &["prompt"]],
    },
    Family {
        path: "/v1/images/generations",
        output: Output::Images,
        required: &[&["prompt"]],
    },
    Family {
        path: "/v1/images/kolors-virtual-try-on",
        output: Output::Images,
        required: &[&["human_image"]],
    },
];

/// In characters.
const LONGEST_PROMPT: usize = 2500;

/// In characters. Kling documents none; this one bounds what the sandbox remembers.
const LONGEST_EXTERNAL_ID: usize = 1024;

const IMAGE_COUNTS: RangeInclusive<usize> = 1..=9;

// === impl Order ===

impl Order {
    /// Reads and checks the body of a create.
    ///
    /// # Errors
    ///
    /// 1200 when it is no JSON object, 1201 when a value is missing or illegal.
    pub(super) fn parse(family: &Family, body: &[u8]) -> Result<Self, Refusal> {
        let fields: Map<String, Value> = serde_json::from_slice(body)
            .map_err(|_| Refusal::new(1200, "The request body must be a JSON object"))?;
        for group in family.required {
            if !group.iter().any(|name| is_filled(fields.get(*name))) {
                let names = group.join(" or ");
                return Err(Refusal::parameter(format!("{names} is missing or empty")));
            }
        }
        if let Some(name) = data_url(&fields) {
            let message = format!("{name} must be Base64 without a data: prefix");
            return Err(Refusal::parameter(message));
        }
        let prompt = text(&fields, "prompt", LONGEST_PROMPT)?.unwrap_or_default();
        let external_id = text(&fields, "external_task_id", LONGEST_EXTERNAL_ID)?;
        Ok(Self {
            external_id: external_id.map(str::to_owned),
            count: count(family.output, fields.get("n"))?,
            trigger: Trigger::parse(prompt)?,
        })
    }
}

fn is_filled(value: Option<&Value>) -> bool {
    match value {
        Some(Value::String(text)) => !text.trim().is_empty(),
        Some(Value::Array(items)) => !items.is_empty(),
        _ => false,
    }
}

/// The first image that is a `data:` URL, which the vendor's pages name as a mistake.
fn data_url(fields: &Map<String, Value>) -> Option<&String> {
    let is_data_url = |value: &Value| value.as_str().is_some_and(|text| text.starts_with("data:"));
    let mut images = fields.iter().filter(|(name, _)| name.contains("image"));
    images
        .find(|(_, value)| is_data_url(value))
        .map(|(name, _)| name)
}

/// An optional text; empty counts as absent, as in the vendor's examples.
fn text<'a>(
    fields: &'a Map<String, Value>,
    name: &str,
    longest: usize,
) -> Result<Option<&'a str>, Refusal> {
    match fields.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if text.chars().count() > longest => Err(Refusal::parameter(
            format!("{name} cannot exceed {longest} characters"),
        )),
        Some(Value::String(text)) => Ok(Some(text.as_str()).filter(|text| !text.is_empty())),
        Some(_) => Err(Refusal::parameter(format!("{name} must be a string"))),
    }
}

fn count(output: Output, n: Option<&Value>) -> Result<usize, Refusal> {
    let Some(n) = n.filter(|n| output == Output::Images && !n.is_null()) else {
        return Ok(1);
    };
    let count = n.as_u64().and_then(|count| usize::try_from(count).ok());
    count
        .filter(|count| IMAGE_COUNTS.contains(count))
        .ok_or_else(|| Refusal::parameter("n must be an integer from 1 to 9"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn family(path: &str) -> &'static Family {
        FAMILIES
            .iter()
            .find(|family| family.path.ends_with(path))
            .unwrap()
    }

    #[test]
    fn a_body_that_is_no_json_object_is_refused_with_1200() {
        for body in ["", "{", "[]", "\"a\"", "prompt=a"] {
            let refusal = Order::parse(family("text2video"), body.as_bytes()).unwrap_err();
            assert_eq!(
                (refusal.status.as_u16(), refusal.code),
                (400, 1200),
                "{body}"
            );
        }
    }

    #[test]
    fn an_illegal_value_is_refused_with_1201_and_named() {
        for (path, body, name) in [
            ("text2video", json!({}), "prompt"),
            ("text2video", json!({"prompt": ""}), "prompt"),
            ("text2video", json!({"prompt": 7}), "prompt"),
            ("text2video", json!({"prompt": "a".repeat(2501)}), "prompt"),
            (
                "text2video",
                json!({"prompt": "a", "external_task_id": 7}),
                "external_task_id",
            ),
            ("generations", json!({"n": 1}), "prompt"),
            ("generations", json!({"prompt": "a", "n": 0}), "n"),
            ("generations", json!({"prompt": "a", "n": 10}), "n"),
            ("generations", json!({"prompt": "a", "n": "2"}), "n"),
            ("generations", json!({"prompt": "a", "n": 2.0}), "n"),
            ("/image2video", json!({"prompt": "a"}), "image"),
            ("/image2video", json!({"image": null}), "image"),
            (
                "/image2video",
                json!({"image": "data:image/png;base64,AA"}),
                "image",
            ),
            (
                "multi-image2video",
                json!({"prompt": "a", "image_list": []}),
                "image_list",
            ),
            ("kolors-virtual-try-on", json!({}), "human_image"),
        ] {
            let refusal = Order::parse(family(path), body.to_string().as_bytes()).unwrap_err();
            assert_eq!(
                (refusal.status.as_u16(), refusal.code),
                (400, 1201),
                "{path} {body}"
            );
            assert!(
                refusal.message.starts_with(name),
                "{path} {body}: {}",
                refusal.message
            );
        }
    }

    #[test]
    fn a_video_counts_once_and_images_count_n_times() {
        for (path, body, count) in [
            ("text2video", json!({"prompt": "a", "n": 3}), 1),
            ("/image2video", json!({"image_tail": "AA"}), 1),
            ("generations", json!({"prompt": "a"}), 1),
            (
                "generations",
                json!({"prompt": "a", "n": null, "external_task_id": ""}),
                1,
            ),
            ("generations", json!({"prompt": "a", "n": 9}), 9),
        ] {
            let order = Order::parse(family(path), body.to_string().as_bytes()).unwrap();
            assert_eq!(
                (order.count, order.external_id),
                (count, None),
                "{path} {body}"
            );
        }
    }
}
