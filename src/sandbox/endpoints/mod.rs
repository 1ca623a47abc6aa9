//! Resources that the sandbox serves besides the account and the cursor lists: one row for each.
//!
//! Paths and operations are those of Kling's pages under `kling.ai/document-api` (as quoted by
//! `aself101/kling-api`, or by other public mirrors if it does not quote them; read 2026-11-24). Required
//! fields, limits and results have the same source, except if a comment says "guessed".

mod legacy;
mod new_standard;

use super::packs::PackType;

/// Resource of the API: a path, its operations and their output.
#[derive(Debug)]
pub(super) struct Endpoint {
    /// Path, which may end in `{model}`.
    pub(super) path: &'static str,
    pub(super) kind: EndpointKind,
    pub(super) output: Output,
    /// Fields that must be present and not empty: `a|b` needs at least one of them, `a^b` exactly one. A
    /// `.` leads into an object, or to the item of a list that has this index or `type`.
    pub(super) required: &'static [&'static str],
    /// Text fields with their greatest lengths, in characters.
    pub(super) limits: &'static [(&'static str, usize)],
    /// Fields with all values that they may have.
    pub(super) values: &'static [(&'static str, &'static [&'static str])],
    /// Field of the body with the client's own id for the task; `None` if it can have none.
    pub(super) external_id: Option<&'static str>,
    /// True if a query below the path finds a task by that id.
    pub(super) by_external_id: bool,
    pub(super) largest_page: usize,
    /// Model names that may replace `{model}`.
    pub(super) models: &'static [&'static str],
    /// True if the path is of the new standard, but its create response has `task_id`, and its tasks end as
    /// `succeed`.
    pub(super) is_hybrid: bool,
}

/// Requests that a path accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EndpointKind {
    /// POST creates a task, GET lists tasks, GET of `/{id}` queries one task.
    Tasks,
    /// POST creates a task of the new standard, to be queried at `/tasks`.
    NewTasks,
    /// POST creates a task of the new standard, to be queried at `/solutions`.
    Solutions,
    /// POST returns the result at once, without a task.
    Immediate,
    /// GET lists elements or voices that Kling provides.
    Presets,
    /// POST deletes the output whose id is in this field.
    Deletes(&'static str),
}

/// Output of a task, or content of an immediate response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Output {
    Video,
    /// A video made from another video, which the task names.
    ChildVideo,
    /// As many images as `n` in the request.
    Images,
    /// As many images as `n`, or a series of `series_amount` images.
    Series,
    /// Three images, each from three sides.
    Shots,
    TryOn,
    Sound,
    VideoSound,
    Element,
    /// An element of the older service, whose path has no tasks: the response is the element itself.
    OldElement,
    Voice,
    Speech,
    Faces,
    Segments,
    Selection,
    Mask,
    Cleared,
    Preview,
}

/// Values that most rows have in common.
const TASKS: Endpoint = Endpoint {
    path: "",
    kind: EndpointKind::Tasks,
    output: Output::Video,
    required: &[],
    limits: &[("prompt", 2500), ("negative_prompt", 2500)],
    values: &[],
    external_id: Some("external_task_id"),
    by_external_id: true,
    largest_page: 500,
    models: &[],
    is_hybrid: false,
};

/// Returns every row. No two rows have the same path.
pub(super) fn all() -> impl Iterator<Item = &'static Endpoint> {
    legacy::ROWS.iter().chain(new_standard::ROWS)
}

// === impl Endpoint ===

impl Endpoint {
    /// Returns true if a create makes a task, which has a status and holds slots.
    pub(super) fn has_tasks(&self) -> bool {
        let is_create = matches!(
            self.kind,
            EndpointKind::Tasks | EndpointKind::NewTasks | EndpointKind::Solutions
        );
        is_create && self.output != Output::OldElement
    }

    /// Returns the slots that a task of `count` results holds until its end. A task that makes neither a
    /// video nor an image holds none (guessed).
    pub(super) fn slots(&self, count: u32) -> u32 {
        let holds_slots = !matches!(
            self.output,
            Output::Element | Output::Sound | Output::Speech | Output::Voice
        );
        if self.has_tasks() && holds_slots {
            count
        } else {
            0
        }
    }
}

// === impl Output ===

impl Output {
    /// Returns the product type under which the account counts the output. Guessed for elements and voices.
    pub(super) fn product(self) -> &'static str {
        match self {
            Self::TryOn => "try_on",
            Self::Images
            | Self::Series
            | Self::Shots
            | Self::Segments
            | Self::Element
            | Self::OldElement => "image",
            Self::Sound | Self::Speech | Self::Voice => "audio",
            Self::Video
            | Self::ChildVideo
            | Self::VideoSound
            | Self::Faces
            | Self::Selection
            | Self::Mask
            | Self::Cleared
            | Self::Preview => "video",
        }
    }

    /// Returns the type of the pack that pays for the output. Speech and voices are paid from the pack for
    /// videos (measured by `aself101/kling-api`, 2026). Guessed: other sounds too, and try-on from the pack
    /// for images, because packs have no type for it on Kling's page "Query Task".
    pub(super) fn pack_type(self) -> PackType {
        match self.product() {
            "image" | "try_on" => PackType::Image,
            _ => PackType::Video,
        }
    }

    /// Returns true if the output costs nothing (measured by `aself101/kling-api`, 2026).
    pub(super) fn is_free(self) -> bool {
        matches!(self, Self::Element | Self::OldElement)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::HashSet;

    use super::*;

    /// Returns the first row whose path ends with `path`.
    pub(in crate::sandbox) fn endpoint(path: &str) -> &'static Endpoint {
        all()
            .find(|endpoint| endpoint.path.ends_with(path))
            .unwrap()
    }

    #[test]
    fn no_two_rows_have_the_same_path() {
        let mut paths = HashSet::new();
        for endpoint in all() {
            assert!(paths.insert(endpoint.path), "{}", endpoint.path);
        }
    }

    #[test]
    fn a_row_has_models_where_its_path_has_a_place_for_one() {
        for endpoint in all() {
            let has_place = endpoint.path.ends_with("{model}");
            assert_eq!(has_place, !endpoint.models.is_empty(), "{}", endpoint.path);
        }
    }
}
