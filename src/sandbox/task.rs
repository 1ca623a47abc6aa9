//! A task, from its creation to its end.

use std::time::Duration;

use tokio::time::Instant;

use super::create_request::CreateRequest;
use super::endpoints::{Endpoint, EndpointKind, Output};
use super::fault::Ending;
use super::packs::PackType;

/// Task, or immediate response, which is paid for like a task.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) id: u64,
    /// Id of the single output: a video, an element, a session.
    pub(super) product: u64,
    pub(super) endpoint: &'static Endpoint,
    pub(super) request: CreateRequest,
    /// Creation time that clients see, since the epoch.
    pub(super) created_at: Duration,
    /// Creation time from which the age is counted.
    pub(super) created: Instant,
    /// Time from creation to end.
    pub(super) time: Duration,
    /// Units of its pack that were spent before this task was deducted, at its end.
    pub(super) spent_before: u32,
    /// True if the output was deleted.
    pub(super) is_deleted: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Submitted,
    Processing,
    Succeeded,
    Failed,
}

// === impl Task ===

impl Task {
    /// Returns an element or a voice that Kling provides.
    pub(super) fn preset(
        endpoint: &'static Endpoint,
        id: u64,
        request: CreateRequest,
        created_at: Duration,
        now: Instant,
    ) -> Self {
        Self {
            id,
            product: id,
            endpoint,
            request,
            created_at,
            created: now,
            time: Duration::ZERO,
            spent_before: 0,
            is_deleted: false,
        }
    }

    pub(super) fn status(&self, now: Instant) -> Status {
        let age = self.age(now);
        if age < self.time / 3 {
            Status::Submitted
        } else if age < self.time {
            Status::Processing
        } else if self.fails() {
            Status::Failed
        } else {
            Status::Succeeded
        }
    }

    /// Returns the price in units. Guessed: one unit for each result. A task that fails costs nothing
    /// (documented).
    pub(super) fn price(&self) -> u32 {
        let is_preset = self.endpoint.kind == EndpointKind::Presets;
        if self.fails() || is_preset || self.endpoint.output.is_free() {
            0
        } else {
            self.request.count
        }
    }

    /// Returns the type of the pack whose units pay for the task, and whose slots it holds.
    pub(super) fn pack_type(&self) -> PackType {
        self.endpoint.output.pack_type()
    }

    /// Returns the slots that the task holds until its end.
    pub(super) fn slots(&self) -> u32 {
        self.endpoint.slots(self.request.count)
    }

    /// Returns the time of the end, since the epoch.
    pub(super) fn ended_at(&self) -> Duration {
        self.created_at.saturating_add(self.time)
    }

    pub(super) fn fails(&self) -> bool {
        self.request.fault.ending == Ending::Fail
    }

    /// Returns true if the task has this external id.
    pub(super) fn is_called(&self, external_id: &str) -> bool {
        self.request.external_id.as_deref() == Some(external_id)
    }

    /// Returns true if lists leave the task out. A deleted element stays in lists, with another status
    /// (documented). Guessed: other deleted outputs do not stay.
    pub(super) fn is_gone(&self) -> bool {
        self.is_deleted && self.endpoint.output != Output::Element
    }

    pub(super) fn age(&self, now: Instant) -> Duration {
        now.duration_since(self.created)
    }
}

// === impl Status ===

impl Status {
    /// Returns the name in the new standard.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Submitted => "submitted",
            Self::Processing => "processing",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
        }
    }
}
