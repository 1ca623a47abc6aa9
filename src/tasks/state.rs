//! The states of a create and its task, and the steps between them.

use std::fmt;

/// State of a create or of its task. `docs/tasks.md` lists them for users.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TaskState {
    /// The create waits for a slot.
    Queued,
    /// The create is being sent, and its outcome is not recorded yet.
    Sending,
    /// Kling has made the task.
    Submitted,
    /// Kling works on the task.
    Processing,
    /// The task has ended, and has results.
    Succeeded,
    /// The task has ended without results.
    Failed,
    /// There is no task: Kling refused the create, or nothing of it was sent.
    Rejected,
    /// There is no task: the create was given up before it was sent.
    Canceled,
    /// A task may exist: the answer to the create was lost, or cannot be read.
    Unknown,
}

use TaskState::{
    Canceled, Failed, Processing, Queued, Rejected, Sending, Submitted, Succeeded, Unknown,
};

// === impl TaskState ===

impl TaskState {
    /// All states, in the order of a task's life.
    pub const ALL: [Self; 9] = [
        Queued, Sending, Submitted, Processing, Succeeded, Failed, Rejected, Canceled, Unknown,
    ];

    /// Returns true if news of the state `next` changes a task in this state. News that is late, repeated
    /// or out of order changes nothing, so it never leads back.
    ///
    /// A create that ended as `unknown` may still turn out to have a task, or to have none: a look-up, or
    /// its owner, reports the truth late.
    pub fn accepts(self, next: Self) -> bool {
        match self {
            Queued => next != Queued,
            Sending => !matches!(next, Queued | Sending),
            Submitted => matches!(next, Processing | Succeeded | Failed),
            Processing => matches!(next, Succeeded | Failed),
            Unknown => !matches!(next, Queued | Sending | Unknown),
            Succeeded | Failed | Rejected | Canceled => false,
        }
    }

    /// Returns true if the state is final. `unknown` counts as an end for those who wait.
    pub fn is_ended(self) -> bool {
        !matches!(self, Queued | Sending | Submitted | Processing)
    }

    /// Returns true while Kling works on the task, as far as is known.
    pub fn is_running(self) -> bool {
        matches!(self, Submitted | Processing)
    }

    /// Returns true if the record belongs to the process that handles the create.
    pub fn is_owned(self) -> bool {
        matches!(self, Queued | Sending)
    }

    /// Returns the word for the state, in the store and in answers.
    pub const fn as_str(self) -> &'static str {
        match self {
            Queued => "queued",
            Sending => "sending",
            Submitted => "submitted",
            Processing => "processing",
            Succeeded => "succeeded",
            Failed => "failed",
            Rejected => "rejected",
            Canceled => "canceled",
            Unknown => "unknown",
        }
    }

    /// Reads the word of a state; `None` if there is no such state.
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == word)
    }

    /// Reads Kling's word for the state of a task, in either generation of the API.
    pub fn from_kling(word: &str) -> Option<Self> {
        Some(match word {
            "submitted" => Submitted,
            "processing" => Processing,
            "succeed" | "succeeded" => Succeeded,
            "failed" => Failed,
            _ => return None,
        })
    }
}

impl fmt::Display for TaskState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_of_steps_holds() {
        // Rows: the present state. Columns: news, in the order of `ALL`.
        for (state, row) in [
            (Queued, ".xxxxxxxx"),
            (Sending, "..xxxxxxx"),
            (Submitted, "...xxx..."),
            (Processing, "....xx..."),
            (Succeeded, "........."),
            (Failed, "........."),
            (Rejected, "........."),
            (Canceled, "........."),
            (Unknown, "..xxxxxx."),
        ] {
            let accepts = TaskState::ALL.map(|next| if state.accepts(next) { 'x' } else { '.' });
            assert_eq!(accepts.iter().collect::<String>(), row, "{state}");
        }
    }

    #[test]
    fn words_are_read_as_they_are_written() {
        for state in TaskState::ALL {
            assert_eq!(TaskState::from_word(state.as_str()), Some(state));
        }
        assert_eq!(TaskState::from_word("done"), None);
        assert_eq!(TaskState::from_kling("succeed"), Some(Succeeded));
        assert_eq!(TaskState::from_kling("canceled"), None);
    }
}
