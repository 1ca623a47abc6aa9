//! Rows of the new standard: the path contains the model, and tasks are queried at `/tasks` or `/solutions`.

use super::Output::TryOn;
use super::{Endpoint, EndpointKind, TASKS};

// Guessed: the longest prompt. For some models it is 2500.
const NEW_TASKS: Endpoint = Endpoint {
    kind: EndpointKind::NewTasks,
    limits: &[("prompt", 3072), ("contents.prompt.text", 3072)],
    values: &[("settings.resolution", &["720p", "1080p", "4k"])],
    external_id: Some("options.external_task_id"),
    by_external_id: false,
    ..TASKS
};

const SOLUTIONS: Endpoint = Endpoint {
    kind: EndpointKind::Solutions,
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

pub(super) static ROWS: &[Endpoint] = &[
    Endpoint {
        path: "/text-to-video/{model}",
        required: &["prompt"],
        models: MODELS,
        ..NEW_TASKS
    },
    Endpoint {
        path: "/image-to-video/{model}",
        required: &["contents", "contents.first_frame.url"],
        models: MODELS,
        ..NEW_TASKS
    },
    Endpoint {
        path: "/omni-video/{model}",
        required: &["contents"],
        models: &["kling-3.0-omni", "kling-o1"],
        ..NEW_TASKS
    },
    // Guessed: an element can replace the image.
    Endpoint {
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
    Endpoint {
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
    Endpoint {
        path: "/solutions/talking_agent",
        required: &[
            "contents",
            "contents.avatar_image.url^contents.avatar_id.text",
            "contents.speech_script.text",
        ],
        limits: &[("contents.speech_script.text", 2000)],
        ..SOLUTIONS
    },
    Endpoint {
        path: "/solutions/drama_subtitle",
        required: &["contents", "contents.source_video"],
        ..SOLUTIONS
    },
    Endpoint {
        path: "/solutions/e-commerce/goods_studio",
        required: &[
            "contents",
            "settings.resolution",
            "settings.aspect_ratio",
            "settings.duration",
        ],
        ..SOLUTIONS
    },
    // Guessed: the required contents.
    Endpoint {
        path: "/solutions/e-commerce/clothing_dupe",
        required: &["contents"],
        ..SOLUTIONS
    },
];
