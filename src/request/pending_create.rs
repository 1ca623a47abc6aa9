//! The state of a create request from its arrival to its outcome: it decides if the create may be sent, and
//! writes the log lines about it.
//!
//! | | client waits | client has disconnected |
//! | --- | --- | --- |
//! | nothing was sent, or upstream refused the create | the create may be sent | the create is cancelled |
//! | the create is being sent | the create runs to its end | the create runs to its end |

use std::borrow::Cow;
use std::sync::{Mutex, MutexGuard, PoisonError};

use http::{StatusCode, Uri};
use tokio::sync::Notify;

use crate::error::{Error, chain};
use crate::kling::idempotency::Effect;
use crate::kling::task::{Order, Task};
use crate::request::context::RequestContext;
use crate::tasks::create::CreateRecord;
use crate::tasks::ledger::Ledger;
use crate::tasks::record::RefusedCreate;
use crate::telemetry::{CREATES, INTERIM, printable};

/// A create request without an outcome.
pub struct PendingCreate {
    context: RequestContext,
    record: CreateRecord,
    uri: Uri,
    state: Mutex<CreateState>,
    /// Notified when a change may have cancelled the create.
    changed: Notify,
}

/// The column (`client`) and the row (`is_being_sent`) of the table above.
#[derive(Default)]
struct CreateState {
    client: ClientState,
    is_being_sent: bool,
    /// True once the log has the line of the first attempt.
    was_told: bool,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum ClientState {
    #[default]
    Waits,
    /// The client has the response, or at least its head.
    Answered,
    Left,
}

/// Error for a cancelled create: nothing more of it may be sent.
#[derive(Debug, thiserror::Error)]
#[error("the client has left")]
pub struct ClientLeft;

/// Outcome of a create that its client does not learn.
#[derive(Clone, Copy, Debug)]
pub enum Ending {
    /// The client disconnected, and the create was sent nevertheless.
    CarriedThrough,
    /// The response came after the client had already got a timeout error.
    Late,
    /// Upstream did not respond, or its response cannot be read.
    Unknown,
}

/// Logs a step of a create, under this name.
macro_rules! log_step {
    ($create:ident, $name:expr, $text:expr) => {
        tracing::info!(
            name: $name,
            target: CREATES,
            request_id = $create.context.id().as_str(),
            client = $create.context.client(),
            url.path = &*printable($create.uri.path()),
            task.external_id = $create.external_id().as_deref(),
            "{}",
            $text
        )
    };
}

// === impl PendingCreate ===

impl PendingCreate {
    /// Creates the state of a create that has just arrived.
    pub fn new(context: RequestContext, uri: Uri, ledger: &Ledger) -> Self {
        let record = CreateRecord::new(ledger.clone(), context.id().as_str(), uri.path());
        if let Some(reference) = record.reference() {
            context.is_create(reference);
        }
        Self {
            context,
            record,
            uri,
            state: Mutex::default(),
            changed: Notify::new(),
        }
    }

    /// Returns the context of the request.
    pub fn context(&self) -> &RequestContext {
        &self.context
    }

    /// Records the create in the store, before anything of it is sent.
    pub async fn admit(&self, order: Order) {
        let (client, external_id) = (self.context.client(), self.context.external_id());
        self.record.admit(client, order, external_id).await;
    }

    /// Records what the body has shown that passed meanwhile.
    pub fn learn(&self, order: Order) {
        self.record.learn(order, self.context.external_id());
    }

    /// Records the task that upstream created, as its response names it.
    pub fn created(&self, task: Task) {
        self.record.submitted(&task);
        self.context.created(task);
    }

    /// Records that the response does not tell if there is a task.
    pub fn unreadable(&self) {
        self.record.unknown();
    }

    /// Records the failure of the create.
    pub fn failed(&self, error: &Error) {
        if self.is_being_sent() && !error.refuses_create() {
            return self.record.unknown();
        }
        self.record.rejected(RefusedCreate {
            code: error.code(),
            kind: error.kind().to_owned(),
            message: error.message(),
            upstream_status: error.answer().map(|answer| answer.head.status.as_u16()),
            retryable: error.retryable(Effect::Create),
            attempts: self.context.attempts(),
        });
    }

    /// Records that the client has disconnected, unless it has the response already.
    pub fn client_left(&self) {
        let mut state = self.lock();
        if state.client == ClientState::Waits {
            state.client = ClientState::Left;
            self.changed.notify_one();
        }
    }

    /// Records that the first byte is about to be sent, and logs the first attempt.
    ///
    /// The log line enters the queue of the log before the first byte is sent, and is usually written within
    /// a millisecond. If the process is then killed, that line is the only trace of the create.
    ///
    /// # Errors
    ///
    /// [`ClientLeft`] if the client has disconnected: the create must not be sent.
    pub fn begin_sending(&self) -> Result<(), ClientLeft> {
        let mut state = self.lock();
        if state.client == ClientState::Left {
            return Err(ClientLeft);
        }
        state.is_being_sent = true;
        self.record.begin_sending();
        if !std::mem::replace(&mut state.was_told, true) {
            drop(state);
            log_step!(self, INTERIM, "sending");
        }
        Ok(())
    }

    /// Returns true from the first byte on, until it is known that the request made no task.
    pub fn is_being_sent(&self) -> bool {
        self.lock().is_being_sent
    }

    /// Records that the request made no task: upstream refused it, or has not processed it.
    pub fn not_created(&self) {
        self.lock().is_being_sent = false;
        self.changed.notify_one();
    }

    /// Records that the client has the response, or at least its head.
    pub fn answer(&self) {
        self.lock().client = ClientState::Answered;
    }

    /// Returns true if the client has the response, or at least its head.
    pub fn is_answered(&self) -> bool {
        self.lock().client == ClientState::Answered
    }

    /// Waits until the create is cancelled: the client has disconnected, and there is no task.
    pub async fn cancelled(&self) {
        while !self.lock().is_cancelled() {
            self.changed.notified().await;
        }
    }

    /// Logs that the create was cancelled.
    pub fn log_cancelled(&self) {
        let text = "cancelled, no task was made: the client has left";
        log_step!(self, "cancelled", text);
    }

    /// Records and logs that this process gives the create up: it was cancelled, or cut off while it was
    /// being sent.
    pub fn give_up(&self) {
        if self.is_being_sent() {
            self.record.unknown();
            self.log(
                None,
                None,
                "a create was cut off; its task may exist and be billed",
            );
        } else {
            self.record.canceled();
            self.log_cancelled();
        }
    }

    /// Logs a response that the client does not get. The line may be the only trace of a paid task.
    pub fn log_answer(&self, status: StatusCode, ending: Ending) {
        self.log(Some(status), None, ending.text());
    }

    /// Logs a failure that the client does not learn. If the request made no task, the create is logged as
    /// cancelled.
    pub fn log_failure(&self, error: &Error, ending: Ending) {
        if !self.is_being_sent() {
            return self.log_cancelled();
        }
        self.log(None, Some(error), ending.text());
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
        let ledger = Ledger::without_store(metrics);
        PendingCreate::new(context, Uri::from_static("/v1/videos/text2video"), &ledger)
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
