//! The rows of the new standard: the model is in the path, and the task in one place for all.

use super::Output::TryOn;
use super::{Family, Serves, TASKS};

// Guessed: the longest prompt, which is 2500 for some models.
const NEW_TASKS: Family = Family {
    serves: Serves::NewTasks,
    limits: &[("prompt", 3072), ("contents.prompt.text", 3072)],
    values: &[("settings.resolution", &["720p", "1080p", "4k"])],
    external_id: Some("options.external_task_id"),
    by_external_id: false,
    ..TASKS
};

const SOLUTIONS: Family = Family {
    serves: Serves::Solutions,
    limits: &[],
    values: &[("settings.resolution", &["720p", "1080p"])],
    ..NEW_TASKS
};

const MODELS: &[&str] = &[
    "kling-3.0-turbo",
    "kling-3.0",
    "kling-2.6",
    "kling-2.5-turbo",
];

pub(super) static ROWS: &[Family] = &[
    Family {
        path: "/text-to-video/{model}",
        required: &["prompt"],
        models: MODELS,
        ..NEW_TASKS
    },
    Family {
        path: "/image-to-video/{model}",
        required: &["contents", "contents.first_frame.url"],
        models: MODELS,
        ..NEW_TASKS
    },
    Family {
        path: "/omni-video/{model}",
        required: &["contents"],
        models: &["kling-3.0-omni", "kling-o1"],
        ..NEW_TASKS
    },
    // Guessed: that an element can stand for the image.
    Family {
        path: "/motion-control/{model}",
        required: &[
            "contents",
            "contents.image.url|contents.element.element_id",
            "contents.video.url",
            "settings.character_orientation",
        ],
        values: &[
            ("settings.character_orientation", &["image", "video"]),
            ("settings.resolution", &["720p", "1080p"]),
        ],
        models: &["kling-3.0", "kling-2.6"],
        ..NEW_TASKS
    },
    Family {
        path: "/solutions/virtual_try_on",
        output: TryOn,
        required: &[
            "contents",
            "contents.product_image.url",
            "contents.person_image.url",
        ],
        is_hybrid: true,
        ..SOLUTIONS
    },
    Family {
        path: "/solutions/talking_agent",
        required: &[
            "contents",
            "contents.avatar_image.url^contents.avatar_id.text",
            "contents.speech_script.text",
        ],
        limits: &[("contents.speech_script.text", 2000)],
        ..SOLUTIONS
    },
    Family {
        path: "/solutions/drama_subtitle",
        required: &["contents", "contents.source_video"],
        ..SOLUTIONS
    },
    Family {
        path: "/solutions/e-commerce/goods_studio",
        required: &[
            "contents",
            "settings.resolution",
            "settings.aspect_ratio",
            "settings.duration",
        ],
        ..SOLUTIONS
    },
    // Guessed: which contents are required.
    Family {
        path: "/solutions/e-commerce/clothing_dupe",
        required: &["contents"],
        ..SOLUTIONS
    },
];
