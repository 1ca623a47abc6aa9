//! A create from its arrival to its outcome: whether it may be sent, and what the log says of it.
//!
//! | | its client waits | its client has left |
//! | --- | --- | --- |
//! | nothing was sent, or upstream refused it | it may be sent | it is cancelled |
//! | it is being sent | it is carried through | it is carried through |

use std::borrow::Cow;
use std::sync::{Mutex, MutexGuard, PoisonError};

use http::{StatusCode, Uri};
use tokio::sync::Notify;

use crate::error::{Error, chain};
use crate::request::context::RequestContext;
use crate::telemetry::{CREATES, printable};

/// One create that has no outcome yet.
pub struct PendingCreate {
    context: RequestContext,
    uri: Uri,
    state: Mutex<CreateState>,
    /// Notified when the create may be cancelled now.
    changed: Notify,
}

/// The row and the column of the table above.
#[derive(Default)]
struct CreateState {
    client: ClientState,
    is_being_sent: bool,
    /// Whether the log has a line of the first time.
    was_told: bool,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum ClientState {
    #[default]
    Waits,
    /// It has the answer, or the head of it.
    Answered,
    Left,
}

/// The create was cancelled: nothing of it may be sent any more.
#[derive(Debug, thiserror::Error)]
#[error("the client has left")]
pub struct ClientLeft;

/// What became of a create whose client does not learn it.
#[derive(Clone, Copy, Debug)]
pub enum Ending {
    /// Its client left, and it was sent all the same.
    CarriedThrough,
    /// Upstream answered after the client was told that it did not.
    Late,
    /// Upstream did not answer, or its answer cannot be read.
    Unknown,
}

// === impl PendingCreate ===

impl PendingCreate {
    /// A create that has just arrived.
    pub fn new(context: RequestContext, uri: Uri) -> Self {
        Self {
            context,
            uri,
            state: Mutex::default(),
            changed: Notify::new(),
        }
    }

    /// What is known of its request.
    pub fn context(&self) -> &RequestContext {
        &self.context
    }

    /// Its client does not wait any more.
    pub fn client_left(&self) {
        let mut state = self.lock();
        if state.client == ClientState::Waits {
            state.client = ClientState::Left;
            self.changed.notify_one();
        }
    }

    /// Its first byte is about to be sent. The line of it is in the queue of the log before, and mostly
    /// written within a millisecond: it is what is left if the process is killed then.
    ///
    /// # Errors
    ///
    /// [`ClientLeft`]: it must not be sent.
    pub fn begin_sending(&self) -> Result<(), ClientLeft> {
        let mut state = self.lock();
        if state.client == ClientState::Left {
            return Err(ClientLeft);
        }
        state.is_being_sent = true;
        if !std::mem::replace(&mut state.was_told, true) {
            drop(state);
            self.log_step("sending");
        }
        Ok(())
    }

    /// Returns true from its first byte on, until it is known that there is no task of it.
    pub fn is_being_sent(&self) -> bool {
        self.lock().is_being_sent
    }

    /// There is no task of what was sent: upstream refused it, or has not processed it.
    pub fn not_created(&self) {
        self.lock().is_being_sent = false;
        self.changed.notify_one();
    }

    /// Its client has the answer, or the head of it.
    pub fn answer(&self) {
        self.lock().client = ClientState::Answered;
    }

    /// Returns true if its client has the answer, or the head of it.
    pub fn is_answered(&self) -> bool {
        self.lock().client == ClientState::Answered
    }

    /// Waits until it is cancelled: its client has left, and there is no task of it.
    pub async fn cancelled(&self) {
        while !self.lock().is_cancelled() {
            self.changed.notified().await;
        }
    }

    /// Logs that it was cancelled.
    pub fn log_cancelled(&self) {
        self.log_step("cancelled, no task was made: the client has left");
    }

    /// Logs that it was given up in this process: cancelled, or cut off while it was being sent.
    pub fn log_given_up(&self) {
        if self.is_being_sent() {
            self.log(
                None,
                None,
                "a create was cut off; its task may exist and be billed",
            );
        } else {
            self.log_cancelled();
        }
    }

    /// Logs an answer that its client does not learn. The line may be all that is left of a paid task.
    pub fn log_answer(&self, status: StatusCode, ending: Ending) {
        self.log(Some(status), None, ending.text());
    }

    /// Logs a failure that its client does not learn. If there is no task of it, it was cancelled.
    pub fn log_failure(&self, error: &Error, ending: Ending) {
        if !self.is_being_sent() {
            return self.log_cancelled();
        }
        self.log(None, Some(error), ending.text());
    }

    fn log_step(&self, text: &str) {
        tracing::info!(
            target: CREATES,
            request_id = self.context.id().as_str(),
            client = self.context.client(),
            url.path = &*printable(self.uri.path()),
            task.external_id = self.external_id().as_deref(),
            "{text}"
        );
    }

    fn log(&self, status: Option<StatusCode>, error: Option<&Error>, text: &str) {
        let task = self.context.task();
        let cause = error.map(|error| chain(error));
        tracing::warn!(
            target: CREATES,
            request_id = self.context.id().as_str(),
            client = self.context.client(),
            url.path = &*printable(self.uri.path()),
            task.id = task.and_then(|task| task.id.as_deref()).map(printable).as_deref(),
            task.external_id = self.external_id().as_deref(),
            http.response.status_code = status.map(|status| status.as_u16()),
            http.request.resend_count = self.context.resend_count(),
            error.type = error.map(Error::kind),
            error.cause = cause.as_deref().map(printable).as_deref(),
            "{text}"
        );
    }

    fn external_id(&self) -> Option<Cow<'_, str>> {
        self.context.external_id().map(printable)
    }

    fn lock(&self) -> MutexGuard<'_, CreateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl CreateState ===

impl CreateState {
    fn is_cancelled(&self) -> bool {
        self.client == ClientState::Left && !self.is_being_sent
    }
}

// === impl Ending ===

impl Ending {
    fn text(self) -> &'static str {
        match self {
            Self::CarriedThrough => "the client has gone; its create was carried through",
            Self::Late => "upstream answered a create after its client was told that it did not",
            Self::Unknown => "no whole answer to a create; its task may exist and be billed",
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures_util::FutureExt;
    use http::HeaderMap;

    use super::*;
    use crate::request::id::RequestId;
    use crate::telemetry::metrics::Metrics;

    fn create() -> PendingCreate {
        let metrics = Arc::new(Metrics::new().unwrap());
        let context = RequestContext::new(RequestId::of(&HeaderMap::new()), metrics.enter());
        PendingCreate::new(context, Uri::from_static("/v1/videos/text2video"))
    }

    /// An event, and what the create is after it.
    type Step = (fn(&PendingCreate) -> bool, &'static str);

    const BEGIN: Step = (|create| create.begin_sending().is_ok(), "begin");
    const REFUSED: Step = (|create| create.begin_sending().is_err(), "refused");
    const LEAVE: Step = (
        |create| {
            create.client_left();
            true
        },
        "leave",
    );
    const ANSWER: Step = (
        |create| {
            create.answer();
            true
        },
        "answer",
    );
    const NOT_CREATED: Step = (
        |create| {
            create.not_created();
            true
        },
        "not created",
    );

    #[test]
    fn table_of_states_holds() {
        // After these steps: is it being sent, answered, cancelled?
        for (steps, is_being_sent, is_answered, is_cancelled) in [
            (&[][..], false, false, false),
            (&[BEGIN], true, false, false),
            (&[LEAVE], false, false, true),
            (&[LEAVE, REFUSED], false, false, true),
            (&[BEGIN, LEAVE], true, false, false),
            (&[BEGIN, NOT_CREATED], false, false, false),
            (&[BEGIN, NOT_CREATED, BEGIN], true, false, false),
            (&[BEGIN, NOT_CREATED, LEAVE, REFUSED], false, false, true),
            (&[BEGIN, LEAVE, NOT_CREATED, REFUSED], false, false, true),
            (&[BEGIN, ANSWER], true, true, false),
            // The client got an answer before it left.
            (&[BEGIN, ANSWER, LEAVE], true, true, false),
            (&[BEGIN, NOT_CREATED, ANSWER, LEAVE], false, true, false),
        ] {
            let create = create();
            let mut names = Vec::new();
            for (step, name) in steps {
                names.push(*name);
                assert!(step(&create), "{names:?}");
            }
            let state = (
                create.is_being_sent(),
                create.is_answered(),
                create.cancelled().now_or_never().is_some(),
            );
            assert_eq!(
                state,
                (is_being_sent, is_answered, is_cancelled),
                "{names:?}"
            );
        }
    }

    #[tokio::test]
    async fn whoever_waits_for_a_cancellation_is_woken() {
        let last_steps = [(&[][..], LEAVE), (&[BEGIN, LEAVE], NOT_CREATED)];
        for (before, last) in last_steps {
            let create = Arc::new(create());
            for (step, _) in before {
                step(&create);
            }
            let waiting = Arc::clone(&create);
            let waiting = tokio::spawn(async move { waiting.cancelled().await });
            tokio::task::yield_now().await;
            assert!(!waiting.is_finished());
            (last.0)(&create);
            waiting.await.unwrap();
        }
    }
}
