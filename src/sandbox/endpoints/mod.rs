//! What the sandbox serves besides the account and the cursor lists: one row for each resource of the API.
//!
//! Paths and operations are those of the vendor's pages under `kling.ai/document-api` (as quoted by
//! `aself101/kling-api`, and where those are silent by other public mirrors; read 2026-11-24). So are required
//! fields, limits and results, but for what a comment calls guessed.

mod legacy;
mod new_standard;

/// A resource: a path, what can be done there, and what comes of it.
#[derive(Debug)]
pub(super) struct Endpoint {
    /// May end in `{model}`.
    pub(super) path: &'static str,
    pub(super) kind: EndpointKind,
    pub(super) output: Output,
    /// Fields that must be there and not empty: `a|b` wants one at least, `a^b` exactly one. A `.` goes into an
    /// object, or to the item of a list that has this index or `type`.
    pub(super) required: &'static [&'static str],
    /// The longest texts, in characters.
    pub(super) limits: &'static [(&'static str, usize)],
    /// Fields with all the values that they may have.
    pub(super) values: &'static [(&'static str, &'static [&'static str])],
    /// Where a body has the client's own name for the task; `None` where it can have none.
    pub(super) external_id: Option<&'static str>,
    /// Whether a task is found by that name below the path.
    pub(super) by_external_id: bool,
    pub(super) largest_page: usize,
    /// What may stand for `{model}`.
    pub(super) models: &'static [&'static str],
    /// Whether it is new, but names its tasks `task_id` at first and ends them as `succeed`.
    pub(super) is_hybrid: bool,
}

/// Which requests a path takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EndpointKind {
    /// POST creates a task, GET lists them, GET of `/{id}` queries one.
    Tasks,
    /// POST creates a task of the new standard, to be queried at `/tasks`.
    NewTasks,
    /// The same, to be queried at `/solutions`.
    Solutions,
    /// POST answers at once.
    Immediate,
    /// GET lists what Kling provides.
    Presets,
    /// POST deletes the output whose id is in this field.
    Deletes(&'static str),
}

/// What a task makes, or an answer tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Output {
    Video,
    /// A video made of another one, which its task names.
    ChildVideo,
    /// As many as `n` says.
    Images,
    /// The same, or a series of `series_amount`.
    Series,
    /// Three pictures, each from three sides.
    Shots,
    TryOn,
    Sound,
    VideoSound,
    Element,
    /// An element of the older service, whose path has no tasks: it answers with the element itself.
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

/// What most rows have in common.
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

/// Every row; no two have the same path.
pub(super) fn all() -> impl Iterator<Item = &'static Endpoint> {
    legacy::ROWS.iter().chain(new_standard::ROWS)
}

// === impl Endpoint ===

impl Endpoint {
    /// Whether what it makes is a task, with a state to be asked for and a slot to be held.
    pub(super) fn has_tasks(&self) -> bool {
        let is_create = matches!(
            self.kind,
            EndpointKind::Tasks | EndpointKind::NewTasks | EndpointKind::Solutions
        );
        is_create && self.output != Output::OldElement
    }
}

// === impl Output ===

impl Output {
    /// The sort of product that the account counts it as; guessed for elements and voices.
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
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::HashSet;

    use super::*;

    /// The row of a path, or of its end.
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
