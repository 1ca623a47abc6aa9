//! What Kling documents of each path: the section "API surface" of its description, in literals of our own.

use serde_json::{Value, json};

/// A family that creates tasks: path, a body that is enough, and the shape of its `task_result`. `CQL` in the
/// documentation: create, query one, list.
pub(super) type Row = (&'static str, Value, Value);

/// What any URL in a body is: nobody looks.
const URL: &str = "https://files.test/1";

pub(super) fn families() -> Vec<Row> {
    let all = [video_families(), image_families(), other_families()];
    all.into_iter().flatten().collect()
}

fn video_families() -> Vec<Row> {
    let face = json!({
        "face_id": "0", "audio_id": "1", "sound_start_time": 0, "sound_end_time": 2000, "sound_insert_time": 0,
    });
    let of_images = json!({ "prompt": "a", "image_list": [{ "image": URL }] });
    let moved = json!({ "image_url": URL, "video_url": URL, "character_orientation": "image" });
    let effect = json!({ "effect_scene": "hug_pro", "input": { "images": [URL, URL] } });
    let creates = [
        ("/v1/videos/text2video", json!({ "prompt": "a" })),
        ("/v1/videos/image2video", json!({ "image": URL })),
        ("/v1/videos/multi-image2video", of_images),
        ("/v1/videos/omni-video", json!({ "prompt": "a" })),
        ("/v1/videos/motion-control", moved),
        ("/v1/videos/video-extend", json!({ "video_id": "1" })),
        (
            "/v1/videos/lip-sync",
            json!({ "input": { "video_id": "1" } }),
        ),
        (
            "/v1/videos/advanced-lip-sync",
            json!({ "session_id": "1", "face_choose": [face] }),
        ),
        (
            "/v1/videos/avatar/image2video",
            json!({ "image": URL, "audio_id": "1" }),
        ),
        ("/v1/videos/effects", effect),
    ];
    let result = json!({ "videos": [video_shape()] });
    let mut rows: Vec<Row> = creates
        .map(|(path, body)| (path, body, result.clone()))
        .into();
    let edit = json!({ "session_id": "1", "edit_mode": "removal", "prompt": "a" });
    let edited = joined(&video_shape(), &json!({ "session_id": "string" }));
    rows.push((
        "/v1/videos/multi-elements",
        edit,
        json!({ "videos": [edited] }),
    ));
    rows
}

fn image_families() -> Vec<Row> {
    let expanded = json!({
        "image": URL,
        "up_expansion_ratio": 0, "down_expansion_ratio": 0.5, "left_expansion_ratio": 0, "right_expansion_ratio": 0,
    });
    let of_images = json!({ "subject_image_list": [{ "subject_image": URL }] });
    let worn = json!({ "human_image": URL, "cloth_image": URL });
    let creates = [
        ("/v1/images/generations", json!({ "prompt": "a" })),
        ("/v1/images/multi-image2image", of_images),
        ("/v1/images/editing/expand", expanded),
        ("/v1/images/kolors-virtual-try-on", worn),
    ];
    let images = json!([{ "index": "number", "url": "string" }]);
    let result = json!({ "images": images });
    let mut rows: Vec<Row> = creates
        .map(|(path, body)| (path, body, result.clone()))
        .into();
    let series = json!({ "result_type": "string", "images": images, "series_images": [] });
    rows.push(("/v1/images/omni-image", json!({ "prompt": "a" }), series));
    rows
}

fn other_families() -> Vec<Row> {
    let shot =
        json!({ "index": "number", "url_1": "string", "url_2": "string", "url_3": "string" });
    let element = json!({
        "element_name": "cat", "element_description": "a cat", "reference_type": "image_refer",
        "element_image_list": { "frontal_image": URL, "refer_images": [{ "image_url": URL }] },
    });
    let sound = json!({
        "id": "string", "url_mp3": "string", "url_wav": "string", "duration_mp3": "string", "duration_wav": "string",
    });
    vec![
        (
            "/v1/general/ai-multi-shot",
            json!({ "element_frontal_image": URL }),
            json!({ "images": [shot] }),
        ),
        (
            "/v1/general/advanced-custom-elements",
            element,
            json!({ "elements": [element_shape()] }),
        ),
        (
            "/v1/general/custom-voices",
            json!({ "voice_name": "cat", "voice_url": URL }),
            json!({ "voices": [voice_shape()] }),
        ),
        (
            "/v1/audio/text-to-audio",
            json!({ "prompt": "a", "duration": 3 }),
            json!({ "audios": [sound] }),
        ),
        (
            "/v1/audio/video-to-audio",
            json!({ "video_url": URL }),
            json!({ "videos": [video_shape()], "audios": [sound] }),
        ),
    ]
}

fn video_shape() -> Value {
    json!({ "id": "string", "url": "string", "duration": "string" })
}

/// Paths that answer at once: path, a body that is enough, the shape of `data`.
pub(super) fn answers() -> Vec<Row> {
    let deductions = json!({
        "final_unit_deduction": "string",
        "final_balance_deduction": { "quota": "string", "list_price": "string" },
    });
    let with = |shape: Value| joined(&deductions, &shape);
    let step = json!({ "status": "number", "session_id": "string" });
    let size = json!(["number"]);
    let mask = json!({
        "object_id": "number",
        "rle_mask": { "size": size, "counts": "string" },
        "png_mask": { "size": size, "base64": "string" },
    });
    let masked = with(joined(
        &step,
        &json!({ "res": { "frame_index": "number", "rle_mask_list": [mask] } }),
    ));
    let point = json!({ "session_id": "1", "frame_index": 0, "points": [{ "x": 0.5, "y": 0.5 }] });
    let video = json!({
        "fps": "number", "original_duration": "number", "width": "number", "height": "number",
        "total_frame": "number", "normalized_video": "string",
    });
    let preview = json!({ "res": { "video": "string", "video_cover": "string", "tracking_output": "string" } });
    let face = json!({ "face_id": "string", "face_image": "string", "start_time": "number", "end_time": "number" });
    let segment = json!({ "type": "string", "is_contain": "boolean", "url": "string" });
    let speech = json!({
        "task_id": "string", "task_status": "string", "task_status_msg": "string",
        "created_at": "number", "updated_at": "number",
        "task_result": { "audios": [{ "id": "string", "url": "string", "duration": "string" }] },
    });
    let session = json!({ "session_id": "1" });
    vec![
        (
            "/v1/videos/identify-face",
            json!({ "video_id": "1" }),
            with(json!({ "session_id": "string", "face_data": [face] })),
        ),
        (
            "/v1/videos/image-recognize",
            json!({ "image": "AA" }),
            with(json!({ "task_result": { "images": [segment] } })),
        ),
        (
            "/v1/videos/multi-elements/init-selection",
            json!({ "video_id": "1" }),
            with(joined(&step, &video)),
        ),
        (
            "/v1/videos/multi-elements/add-selection",
            point.clone(),
            masked.clone(),
        ),
        ("/v1/videos/multi-elements/delete-selection", point, masked),
        (
            "/v1/videos/multi-elements/clear-selection",
            session.clone(),
            with(step.clone()),
        ),
        (
            "/v1/videos/multi-elements/preview-selection",
            session,
            with(joined(&step, &preview)),
        ),
        (
            "/v1/audio/tts",
            json!({ "text": "a", "voice_id": "1", "voice_language": "en" }),
            with(speech),
        ),
    ]
}

/// Creates of the new standard: path, a body that is enough, the type of its outputs.
pub(super) fn new_families() -> Vec<(&'static str, Value, &'static str)> {
    let contents = |types: &[&str]| {
        let item = |name: &&str| json!({ "type": name, "url": URL, "text": "a" });
        json!({ "contents": types.iter().map(item).collect::<Value>() })
    };
    let motion = json!({ "settings": { "character_orientation": "image" } });
    let studio =
        json!({ "settings": { "resolution": "720p", "aspect_ratio": "9:16", "duration": 15 } });
    vec![
        (
            "/text-to-video/kling-3.0-turbo",
            json!({ "prompt": "a" }),
            "video",
        ),
        (
            "/image-to-video/kling-2.6",
            contents(&["prompt", "first_frame"]),
            "video",
        ),
        ("/omni-video/kling-o1", contents(&["prompt"]), "video"),
        (
            "/motion-control/kling-3.0",
            joined(&contents(&["image", "video"]), &motion),
            "video",
        ),
        (
            "/solutions/virtual_try_on",
            contents(&["product_image", "person_image"]),
            "image",
        ),
        (
            "/solutions/talking_agent",
            contents(&["avatar_id", "speech_script"]),
            "video",
        ),
        (
            "/solutions/drama_subtitle",
            contents(&["source_video"]),
            "video",
        ),
        (
            "/solutions/e-commerce/goods_studio",
            joined(&contents(&["ref_image"]), &studio),
            "video",
        ),
        (
            "/solutions/e-commerce/clothing_dupe",
            contents(&["source_video"]),
            "video",
        ),
    ]
}

pub(super) fn element_shape() -> Value {
    json!({
        "element_id": "number", "element_name": "string", "element_description": "string", "reference_type": "string",
        "element_image_list": { "frontal_image": "string", "refer_images": [{ "image_url": "string" }] },
        "element_video_list": {}, "element_voice_info": {}, "tag_list": [], "owned_by": "string", "status": "string",
    })
}

pub(super) fn old_element_shape() -> Value {
    json!({
        "element_id": "number", "element_name": "string", "element_description": "string",
        "element_frontal_image": "string", "element_refer_list": [{ "image_url": "string" }],
        "tag_list": [], "owned_by": "string",
    })
}

pub(super) fn voice_shape() -> Value {
    json!({ "voice_id": "string", "voice_name": "string", "trial_url": "string", "owned_by": "string" })
}

/// Both objects in one.
pub(super) fn joined(one: &Value, other: &Value) -> Value {
    let mut joined = one.clone();
    let fields = other.as_object().unwrap().clone();
    joined.as_object_mut().unwrap().extend(fields);
    joined
}

/// What all tasks of the legacy API say of themselves.
pub(super) fn head_shape(with_parent: bool) -> Value {
    let mut info = json!({ "external_task_id": "string" });
    if with_parent {
        info["parent_video"] = json!({ "id": "string", "url": "string", "duration": "string" });
    }
    json!({
        "task_id": "string", "task_status": "string", "task_info": info,
        "created_at": "number", "updated_at": "number",
    })
}

pub(super) fn ended_shape(head: &Value, result: &Value) -> Value {
    let rest = json!({
        "task_status_msg": "string",
        "task_result": result,
        "final_unit_deduction": "string",
        "final_balance_deduction": { "quota": "string", "list_price": "string" },
    });
    joined(head, &rest)
}
