//! Rows of the legacy API: all paths under `/v1`.

use super::Output::{
    ChildVideo, Cleared, Element, Faces, Images, Mask, OldElement, Preview, Segments, Selection,
    Series, Shots, Sound, Speech, TryOn, VideoSound, Voice,
};
use super::{Endpoint, EndpointKind, TASKS};

const ANSWERS: Endpoint = Endpoint {
    kind: EndpointKind::Immediate,
    limits: &[],
    external_id: None,
    by_external_id: false,
    ..TASKS
};

const PRESETS: Endpoint = Endpoint {
    kind: EndpointKind::Presets,
    ..ANSWERS
};

const ELEMENT_LIMITS: &[(&str, usize)] = &[("element_name", 20), ("element_description", 100)];

/// Rows of the legacy API. A comment holds for similar rows below it too.
pub(super) static ROWS: &[Endpoint] = &[
    // Guessed: `multi_prompt`, the prompts of several shots, can replace `prompt`.
    Endpoint {
        path: "/v1/videos/text2video",
        required: &["prompt|multi_prompt"],
        ..TASKS
    },
    Endpoint {
        path: "/v1/videos/omni-video",
        required: &["prompt|multi_prompt"],
        ..TASKS
    },
    Endpoint {
        path: "/v1/videos/image2video",
        required: &["image|image_tail"],
        ..TASKS
    },
    Endpoint {
        path: "/v1/videos/multi-image2video",
        required: &["image_list", "prompt"],
        ..TASKS
    },
    Endpoint {
        path: "/v1/videos/motion-control",
        required: &["image_url", "video_url", "character_orientation"],
        ..TASKS
    },
    Endpoint {
        path: "/v1/videos/avatar/image2video",
        required: &["image", "audio_id^sound_file"],
        ..TASKS
    },
    Endpoint {
        path: "/v1/videos/effects",
        required: &["effect_scene", "input.image^input.images"],
        ..TASKS
    },
    // Guessed: the external ids, and the required fields of `lip-sync`, the older lip sync, whose page is
    // gone.
    Endpoint {
        path: "/v1/videos/video-extend",
        output: ChildVideo,
        required: &["video_id"],
        ..TASKS
    },
    Endpoint {
        path: "/v1/videos/lip-sync",
        output: ChildVideo,
        required: &["input.video_id^input.video_url"],
        ..TASKS
    },
    Endpoint {
        path: "/v1/videos/advanced-lip-sync",
        output: ChildVideo,
        required: &[
            "session_id",
            "face_choose.0.face_id",
            "face_choose.0.audio_id^face_choose.0.sound_file",
            "face_choose.0.sound_start_time",
            "face_choose.0.sound_end_time",
            "face_choose.0.sound_insert_time",
        ],
        by_external_id: false,
        ..TASKS
    },
    Endpoint {
        path: "/v1/videos/multi-elements",
        required: &["session_id", "edit_mode", "prompt"],
        values: &[("edit_mode", &["addition", "swap", "removal"])],
        ..TASKS
    },
    // Guessed: all that the responses say about the video. No client reads it.
    Endpoint {
        path: "/v1/videos/multi-elements/init-selection",
        output: Selection,
        required: &["video_id^video_url"],
        ..ANSWERS
    },
    Endpoint {
        path: "/v1/videos/multi-elements/add-selection",
        output: Mask,
        required: &["session_id", "frame_index", "points"],
        ..ANSWERS
    },
    Endpoint {
        path: "/v1/videos/multi-elements/delete-selection",
        output: Mask,
        required: &["session_id", "frame_index", "points"],
        ..ANSWERS
    },
    Endpoint {
        path: "/v1/videos/multi-elements/clear-selection",
        output: Cleared,
        required: &["session_id"],
        ..ANSWERS
    },
    Endpoint {
        path: "/v1/videos/multi-elements/preview-selection",
        output: Preview,
        required: &["session_id"],
        ..ANSWERS
    },
    Endpoint {
        path: "/v1/videos/identify-face",
        output: Faces,
        required: &["video_id^video_url"],
        ..ANSWERS
    },
    Endpoint {
        path: "/v1/videos/image-recognize",
        output: Segments,
        required: &["image"],
        ..ANSWERS
    },
    Endpoint {
        path: "/v1/images/generations",
        output: Images,
        required: &["prompt"],
        ..TASKS
    },
    Endpoint {
        path: "/v1/images/omni-image",
        output: Series,
        required: &["prompt"],
        values: &[("result_type", &["single", "series"])],
        ..TASKS
    },
    Endpoint {
        path: "/v1/images/multi-image2image",
        output: Images,
        required: &["subject_image_list"],
        ..TASKS
    },
    Endpoint {
        path: "/v1/images/editing/expand",
        output: Images,
        required: &[
            "image",
            "up_expansion_ratio",
            "down_expansion_ratio",
            "left_expansion_ratio",
            "right_expansion_ratio",
        ],
        ..TASKS
    },
    Endpoint {
        path: "/v1/images/kolors-virtual-try-on",
        output: TryOn,
        required: &["human_image"],
        ..TASKS
    },
    // Guessed: a task holds one slot and costs as much as any other task.
    Endpoint {
        path: "/v1/general/ai-multi-shot",
        output: Shots,
        required: &["element_frontal_image"],
        by_external_id: false,
        ..TASKS
    },
    Endpoint {
        path: "/v1/general/advanced-custom-elements",
        output: Element,
        required: &[
            "element_name",
            "element_description",
            "reference_type",
            "element_image_list^element_video_list",
        ],
        limits: ELEMENT_LIMITS,
        values: &[("reference_type", &["image_refer", "video_refer"])],
        ..TASKS
    },
    Endpoint {
        path: "/v1/general/custom-voices",
        output: Voice,
        required: &["voice_name", "voice_url|video_id"],
        limits: &[("voice_name", 20)],
        largest_page: 1000,
        ..TASKS
    },
    Endpoint {
        path: "/v1/audio/text-to-audio",
        output: Sound,
        required: &["prompt", "duration"],
        limits: &[("prompt", 200)],
        ..TASKS
    },
    Endpoint {
        path: "/v1/audio/video-to-audio",
        output: VideoSound,
        required: &["video_id^video_url"],
        limits: &[("sound_effect_prompt", 200), ("bgm_prompt", 200)],
        ..TASKS
    },
    Endpoint {
        path: "/v1/audio/tts",
        output: Speech,
        required: &["text", "voice_id", "voice_language"],
        limits: &[("text", 1000)],
        values: &[("voice_language", &["zh", "en"])],
        ..ANSWERS
    },
    Endpoint {
        path: "/v1/general/custom-elements",
        kind: EndpointKind::Tasks,
        output: OldElement,
        required: &[
            "element_name",
            "element_description",
            "element_frontal_image",
            "element_refer_list",
        ],
        limits: ELEMENT_LIMITS,
        ..ANSWERS
    },
    Endpoint {
        path: "/v1/general/presets-elements",
        output: OldElement,
        ..PRESETS
    },
    Endpoint {
        path: "/v1/general/advanced-presets-elements",
        output: Element,
        ..PRESETS
    },
    Endpoint {
        path: "/v1/general/presets-voices",
        output: Voice,
        largest_page: 1000,
        ..PRESETS
    },
    Endpoint {
        path: "/v1/general/delete-voices",
        kind: EndpointKind::Deletes("voice_id"),
        output: Voice,
        ..ANSWERS
    },
    Endpoint {
        path: "/v1/general/delete-advanced-elements",
        kind: EndpointKind::Deletes("element_id"),
        output: Element,
        ..ANSWERS
    },
    // Guessed: it deletes elements of both services, because the pages of both services name it.
    Endpoint {
        path: "/v1/general/delete-elements",
        kind: EndpointKind::Deletes("element_id"),
        output: OldElement,
        ..ANSWERS
    },
];
