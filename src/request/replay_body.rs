//! A request body that can be sent again. The bytes that were read are kept, within limits, while the first
//! attempt streams them on.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use bytesize::ByteSize;
use http_body::{Body as _, Frame, SizeHint};
use tokio::time::timeout;

use crate::error::{BoxError, Error};
use crate::kling::task::{Order, TaskReader};
use crate::reloadable::Reloadable;
use crate::request::context::RequestContext;
use crate::telemetry::metrics::Metrics;

/// A request body that can be sent again. Each clone of an unread body starts at the first byte.
///
/// Only the latest reader may read. After a clone has begun to read, or has become the body of an attempt,
/// every earlier reader gets an error.
#[derive(Clone)]
pub struct ReplayBody {
    /// `None` for a request without a body, which costs nothing to send again.
    source: Option<Arc<Mutex<BodySource>>>,
    /// Position of this clone: the number of bytes that it has delivered.
    at: u64,
    /// Turn of this clone among the readers; `None` until it takes one.
    turn: Option<u64>,
    /// Declared length of the whole body, in bytes, if there is one.
    length: Option<u64>,
}

/// Limits the bytes that are kept of the bodies of all requests together.
pub struct ReplayBudget {
    limits: Reloadable<ReplayLimits>,
    used: AtomicU64,
    metrics: Arc<Metrics>,
}

/// Limits for kept bytes (`retry.replay_body`, `retry.replay_memory`).
#[derive(Clone, Copy, Debug)]
pub struct ReplayLimits {
    /// Most bytes that are kept of one request.
    pub body: ByteSize,
    /// Most bytes that are kept of all requests together.
    pub memory: ByteSize,
}

/// The one body that all clones share.
struct BodySource {
    body: Body,
    /// Frames that were read ahead, before an attempt sends them.
    ahead: VecDeque<Frame<Bytes>>,
    /// Bytes of `ahead` that count in the memory of all requests together.
    reserved: usize,
    /// Number of frames that have arrived; the end of the body counts as one.
    arrived: u64,
    /// True once the body has no more frames to read.
    body_ended: bool,
    /// Reads the external id and the order of a create while its body passes, even if few of the bytes are
    /// kept.
    create: Option<(RequestContext, TaskReader)>,
    /// Copied bytes of the body. A slice of a read buffer would keep the whole buffer alive, and the limits
    /// would not hold.
    kept: Vec<u8>,
    /// Bytes that attempts have read so far, kept or not.
    read: u64,
    /// Turn of the latest reader.
    turn: u64,
    /// True once some of the bytes that were read are no longer kept.
    lost: bool,
    budget: Arc<ReplayBudget>,
}

/// Most bytes of a body that are read before it is sent. The last frame may exceed this.
const AHEAD: usize = 64 << 10;
/// Longest time that a slow client may delay its own create in this way. Usually the whole body is there at
/// once.
const PATIENCE: Duration = Duration::from_millis(200);
/// Most kept bytes that are sent in one frame.
const PIECE: usize = 64 << 10;

// === impl ReplayBody ===

impl ReplayBody {
    /// Wraps a body and keeps the bytes that are read, as long as `budget` has room for them. For a create
    /// request, `create` is its context, which gets the external id that the body contains.
    pub fn new(body: Body, budget: &Arc<ReplayBudget>, create: Option<&RequestContext>) -> Self {
        let length = body.size_hint().exact();
        let source = (!body.is_end_stream()).then(|| {
            Arc::new(Mutex::new(BodySource {
                body,
                ahead: VecDeque::new(),
                reserved: 0,
                arrived: 0,
                body_ended: false,
                create: create.map(|context| (context.clone(), TaskReader::of_request())),
                kept: Vec::new(),
                read: 0,
                turn: 0,
                lost: false,
                budget: Arc::clone(budget),
            }))
        });
        Self {
            source,
            at: 0,
            turn: None,
            length,
        }
    }

    /// Returns the body of a request without one.
    pub fn none() -> Self {
        Self {
            source: None,
            at: 0,
            turn: None,
            length: None,
        }
    }

    /// Returns true if this clone can still deliver the whole body.
    pub fn is_whole(&self) -> bool {
        self.source
            .as_ref()
            .is_none_or(|source| self.at == 0 && !lock(source).lost)
    }

    /// Returns the body for one attempt. Earlier attempts can read nothing more from now on; one on another
    /// thread may not even have started.
    pub fn into_body(mut self) -> Body {
        match &self.source {
            None => return Body::empty(),
            Some(source) => self.turn = Some(lock(source).next_turn()),
        }
        Body::new(self)
    }

    /// Reads the beginning of a create's body before it is sent: until the body ends, 64 KiB are read, or
    /// 200 ms have passed.
    ///
    /// # Errors
    ///
    /// The error with which the body failed.
    pub async fn read_ahead(&self) -> Result<(), Error> {
        let Some(source) = &self.source else {
            return Ok(());
        };
        let reading = poll_fn(|cx| lock(source).poll_ahead(cx));
        timeout(PATIENCE, reading).await.unwrap_or(Ok(()))
    }

    /// Returns the order of a create, as far as its body was read.
    pub fn order(&self) -> Order {
        let source = self.source.as_ref().map(|source| lock(source));
        let reader = source.as_ref().and_then(|source| source.create.as_ref());
        reader.map(|(_, reader)| reader.order()).unwrap_or_default()
    }

    /// Returns the number of frames that have arrived, for any reader. The end of the body counts as one.
    pub fn arrived(&self) -> u64 {
        let source = self.source.as_ref();
        source.map_or(0, |source| lock(source).arrived)
    }

    /// Reads on as long as `nobody_sends` returns true and the limits have room. The disconnection of a
    /// client is noticed only after all that it sent before has been read.
    ///
    /// Returns only if the body fails, with its error.
    pub async fn read_while(&self, nobody_sends: impl Fn() -> bool) -> Error {
        poll_fn(|cx| match &self.source {
            Some(source) if nobody_sends() => lock(source).poll_failure(cx, self.length),
            _ => Poll::Pending,
        })
        .await
    }
}

impl http_body::Body for ReplayBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        let Some(source) = &this.source else {
            return Poll::Ready(None);
        };
        let mut source = lock(source);
        let turn = *this.turn.get_or_insert_with(|| source.next_turn());
        if turn != source.turn {
            // An older reader must not be woken instead of the latest one either.
            return Poll::Ready(Some(Err("the body is being sent again".into())));
        }
        if this.at < source.read {
            let Some(piece) = source.piece(this.at) else {
                return Poll::Ready(Some(Err("the beginning of the body is gone".into())));
            };
            this.at += piece.len() as u64;
            return Poll::Ready(Some(Ok(Frame::data(piece))));
        }
        let step = ready!(source.poll_step(cx));
        Poll::Ready(match step {
            Some(Ok(frame)) => {
                match frame.data_ref() {
                    Some(data) => {
                        source.keep(data, this.length);
                        this.at += data.len() as u64;
                    }
                    // Trailers are not kept, so the body cannot be sent again.
                    None => source.lose(),
                }
                Some(Ok(frame))
            }
            Some(Err(error)) => {
                source.lose();
                Some(Err(error))
            }
            None if this.length.is_some_and(|length| this.at < length) => {
                source.lose();
                Some(Err("the body ended before its declared end".into()))
            }
            None => None,
        })
    }

    fn is_end_stream(&self) -> bool {
        self.source.as_ref().is_none_or(|source| {
            let source = lock(source);
            self.at == source.read && source.is_end_stream()
        })
    }

    fn size_hint(&self) -> SizeHint {
        match self.length {
            Some(length) => SizeHint::with_exact(length.saturating_sub(self.at)),
            None => SizeHint::default(),
        }
    }
}

fn lock(source: &Mutex<BodySource>) -> MutexGuard<'_, BodySource> {
    source.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the memory that a frame takes while it is read ahead, in bytes. The frame itself counts too,
/// because a body may arrive one byte at a time.
fn memory_of(frame: &Frame<Bytes>) -> usize {
    size_of::<Frame<Bytes>>() + frame.data_ref().map_or(0, Bytes::len)
}

// === impl BodySource ===

impl BodySource {
    fn next_turn(&mut self) -> u64 {
        self.turn += 1;
        self.turn
    }

    /// Returns the next frame: one that was read ahead, or else one from the body.
    fn poll_step(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let Some(frame) = self.ahead.pop_front() else {
            return self.poll_body(cx);
        };
        let reserved = memory_of(&frame).min(self.reserved);
        self.reserved -= reserved;
        self.budget.give_back(reserved);
        Poll::Ready(Some(Ok(frame)))
    }

    fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if self.body_ended {
            return Poll::Ready(None);
        }
        let step = ready!(Pin::new(&mut self.body).poll_frame(cx));
        self.arrived += 1;
        match &step {
            Some(Ok(frame)) => {
                if let (Some((context, reader)), Some(data)) = (&mut self.create, frame.data_ref())
                {
                    reader.push(data);
                    if let Some(external_id) = reader.external_id() {
                        context.is_named(external_id);
                    }
                }
            }
            Some(Err(_)) => {}
            None => self.body_ended = true,
        }
        Poll::Ready(step.map(|step| step.map_err(axum::Error::into_inner)))
    }

    fn poll_ahead(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let mut size = 0;
        while self.create.is_some() && size < AHEAD {
            match ready!(self.poll_one_ahead(cx))? {
                Some(more) => size += more,
                None => break,
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Reads ahead within the limits, and waits for the body to fail.
    fn poll_failure(&mut self, cx: &mut Context<'_>, length: Option<u64>) -> Poll<Error> {
        let all = length.unwrap_or_default();
        while self.budget.has_room(all, self.reserved) {
            match ready!(self.poll_one_ahead(cx)) {
                Ok(Some(more)) => {
                    self.budget.reserve(more);
                    self.reserved += more;
                }
                Ok(None) => break,
                Err(error) => return Poll::Ready(error),
            }
        }
        Poll::Pending
    }

    /// Reads one more frame ahead and returns the memory that it takes; `None` at the end of the body.
    fn poll_one_ahead(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<usize>, Error>> {
        if self.body_ended || self.body.is_end_stream() {
            return Poll::Ready(Ok(None));
        }
        let frame = match ready!(self.poll_body(cx)) {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => return Poll::Ready(Err(Error::of_body(error))),
            None => return Poll::Ready(Ok(None)),
        };
        let memory = memory_of(&frame);
        self.ahead.push_back(frame);
        Poll::Ready(Ok(Some(memory)))
    }

    fn is_end_stream(&self) -> bool {
        self.ahead.is_empty() && (self.body_ended || self.body.is_end_stream())
    }

    fn keep(&mut self, data: &[u8], length: Option<u64>) {
        self.read += data.len() as u64;
        if self.lost {
            return;
        }
        // If the whole body will not fit, its beginning is not kept either.
        let all = self.read.max(length.unwrap_or_default());
        if self.budget.take(all, data.len()) {
            self.kept.extend_from_slice(data);
        } else {
            self.lose();
        }
    }

    fn lose(&mut self) {
        self.lost = true;
        self.budget.give_back(self.kept.len());
        self.kept = Vec::new();
    }

    /// Returns the kept bytes from `at` on, at most [`PIECE`] of them.
    fn piece(&self, at: u64) -> Option<Bytes> {
        let rest = self.kept.get(usize::try_from(at).ok()?..)?;
        let piece = &rest[..rest.len().min(PIECE)];
        (!piece.is_empty()).then(|| Bytes::copy_from_slice(piece))
    }
}

impl Drop for BodySource {
    fn drop(&mut self) {
        self.budget.give_back(self.kept.len() + self.reserved);
    }
}

// === impl ReplayBudget ===

impl ReplayBudget {
    /// Creates a budget with these limits. `metrics` counts the bodies that do not fit.
    pub fn new(limits: ReplayLimits, metrics: Arc<Metrics>) -> Self {
        Self {
            limits: Reloadable::new(limits),
            used: AtomicU64::new(0),
            metrics,
        }
    }

    /// Replaces the limits. Bytes that are already kept stay.
    pub fn set_limits(&self, limits: ReplayLimits) {
        self.limits.store(limits);
    }

    /// Reserves room for `more` bytes of a body, and returns true if they fit. `all` is the least length that
    /// the whole body is known to have, in bytes.
    fn take(&self, all: u64, more: usize) -> bool {
        let limits = **self.limits.load();
        let more = more as u64;
        let reason = if all > limits.body.as_u64() {
            "body"
        } else if self.used.fetch_add(more, Relaxed) + more > limits.memory.as_u64() {
            self.used.fetch_sub(more, Relaxed);
            "memory"
        } else {
            return true;
        };
        self.metrics.body_not_kept(reason);
        false
    }

    /// Returns true if there is room to read ahead. `all` is the declared length of the body, or 0; `ahead`
    /// is the memory that its frames read ahead already take. Both are in bytes.
    fn has_room(&self, all: u64, ahead: usize) -> bool {
        let limits = **self.limits.load();
        let memory = self.used.load(Relaxed) < limits.memory.as_u64();
        memory && all.max(ahead as u64) < limits.body.as_u64()
    }

    fn reserve(&self, size: usize) {
        self.used.fetch_add(size as u64, Relaxed);
    }

    fn give_back(&self, size: usize) {
        self.used.fetch_sub(size as u64, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use axum::extract::Request;
    use futures_util::{FutureExt, StreamExt, stream};
    use http_body_util::BodyExt;

    use super::*;
    use crate::request::context::ProxyRequest;

    fn budget(body: u64, memory: u64) -> Arc<ReplayBudget> {
        let limits = ReplayLimits {
            body: ByteSize::b(body),
            memory: ByteSize::b(memory),
        };
        Arc::new(ReplayBudget::new(limits, Arc::new(Metrics::new().unwrap())))
    }

    fn chunks(chunks: &'static [&str]) -> Body {
        Body::from_stream(stream::iter(chunks.iter().copied().map(Ok::<_, BoxError>)))
    }

    async fn rest(body: ReplayBody) -> Result<String, String> {
        let bytes = body.collect().await.map_err(|error| error.to_string())?;
        Ok(String::from_utf8(bytes.to_bytes().to_vec()).unwrap())
    }

    #[tokio::test]
    async fn a_clone_delivers_what_was_read_and_then_what_was_not() {
        let mut first = ReplayBody::new(chunks(&["ab", "cd", "ef"]), &budget(10, 10), None);
        let (second, third) = (first.clone(), first.clone());
        assert_eq!(
            *first.frame().await.unwrap().unwrap().data_ref().unwrap(),
            "ab"
        );
        assert!(second.is_whole() && !second.is_end_stream());
        assert_eq!(rest(second).await, Ok("abcdef".to_owned()));
        assert!(third.is_whole());
        assert_eq!(rest(third).await, Ok("abcdef".to_owned()));
    }

    /// A connection on another thread may poll the body of an attempt that has failed.
    #[tokio::test]
    async fn older_attempt_that_begins_late_takes_nothing_from_the_latest() {
        let first = ReplayBody::new(chunks(&["ab", "cd"]), &budget(10, 10), None);
        let second = first.clone();
        let (older, mut newer) = (first.into_body(), second.into_body());
        let begun = newer.frame().await.unwrap().unwrap();
        assert_eq!(begun.into_data().unwrap(), "ab");
        assert!(older.collect().await.is_err());
        assert_eq!(newer.collect().await.unwrap().to_bytes(), "cd");
    }

    #[tokio::test]
    async fn over_a_bound_the_body_streams_on_but_only_once() {
        for (body, memory) in [(5, 10), (10, 5)] {
            let budget = budget(body, memory);
            let first = ReplayBody::new(chunks(&["abc", "def"]), &budget, None);
            let second = first.clone();
            assert_eq!(rest(first).await, Ok("abcdef".to_owned()));
            assert!(!second.is_whole());
            assert!(rest(second).await.is_err());
            assert_eq!(budget.used.load(Relaxed), 0);
        }
    }

    #[tokio::test]
    async fn memory_is_given_back_with_the_last_clone() {
        let budget = budget(10, 10);
        let first = ReplayBody::new(chunks(&["abc"]), &budget, None);
        let second = first.clone();
        rest(first).await.unwrap();
        assert_eq!(budget.used.load(Relaxed), 3);
        drop(second);
        assert_eq!(budget.used.load(Relaxed), 0);
    }

    #[tokio::test]
    async fn the_length_that_is_left_is_told_where_it_is_known() {
        let mut body = ReplayBody::new(Body::from("abcd"), &budget(10, 10), None);
        let again = body.clone();
        assert_eq!(body.size_hint().exact(), Some(4));
        body.frame().await.unwrap().unwrap();
        assert_eq!(
            (body.size_hint().exact(), body.is_end_stream()),
            (Some(0), true)
        );
        assert_eq!(
            (again.size_hint().exact(), again.is_end_stream()),
            (Some(4), false)
        );
        let unknown = ReplayBody::new(chunks(&["a"]), &budget(10, 10), None);
        assert_eq!(unknown.size_hint().exact(), None);
        assert!(ReplayBody::new(Body::empty(), &budget(0, 0), None).is_end_stream());
    }

    /// A body that declares its length, whatever it has.
    struct Declared(Body, u64);

    impl http_body::Body for Declared {
        type Data = Bytes;
        type Error = axum::Error;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
            Pin::new(&mut self.0).poll_frame(cx)
        }

        fn size_hint(&self) -> SizeHint {
            SizeHint::with_exact(self.1)
        }
    }

    #[tokio::test]
    async fn body_that_ends_before_its_declared_end_is_an_error() {
        for (declared, expected) in [(5, Err(())), (4, Ok("abcd".to_owned()))] {
            let body = Body::new(Declared(chunks(&["ab", "cd"]), declared));
            let first = ReplayBody::new(body, &budget(10, 10), None);
            let second = first.clone();
            assert_eq!(rest(first).await.map_err(drop), expected);
            assert_eq!(second.is_whole(), expected.is_ok());
        }
    }

    #[tokio::test]
    async fn body_is_read_ahead_only_while_nobody_sends_it_and_its_frames_count() {
        let frame = size_of::<Frame<Bytes>>() as u64;
        let budget = budget(10_000, 10_000);
        let sent = stream::iter(["abc", "de"].map(Ok::<_, BoxError>)).chain(stream::pending());
        let body = ReplayBody::new(Body::from_stream(sent), &budget, None);
        let read = |nobody_sends| {
            let failed = body.read_while(move || nobody_sends).now_or_never();
            assert!(failed.is_none());
            (body.arrived(), budget.used.load(Relaxed))
        };
        assert_eq!(read(false), (0, 0));
        assert_eq!(read(true), (2, 2 * frame + 5));
        let mut attempt = body.clone().into_body();
        for (text, used) in [("abc", frame + 2 + 3), ("de", 3 + 2)] {
            let chunk = attempt.frame().await.unwrap().unwrap();
            assert_eq!(chunk.into_data().unwrap(), text);
            assert_eq!(budget.used.load(Relaxed), used);
        }
        drop((attempt, body));
        assert_eq!(budget.used.load(Relaxed), 0);
    }

    fn context() -> RequestContext {
        let metrics = Arc::new(Metrics::new().unwrap());
        ProxyRequest::untraced(Request::default(), &metrics).context
    }

    #[tokio::test(start_paused = true)]
    async fn body_of_a_create_is_read_ahead_within_limits() {
        let frame = size_of::<Frame<Bytes>>();
        let exactly = "x".repeat(AHEAD - frame);
        let half = "x".repeat(AHEAD / 2 + 1);
        for (frames, is_create, is_open, arrived, external_id) in [
            (
                &[r#"{"external_task"#, r#"_id":"mine"}"#, " "][..],
                true,
                false,
                4,
                Some("mine"),
            ),
            // The end of the body counts as one frame.
            (&["{", "}"], true, false, 3, None),
            (&["{"], true, true, 1, None),
            (&[&exactly, "x", "x"], true, false, 1, None),
            (&[&exactly[1..], "x", "x"], true, false, 2, None),
            (&[&half, &half, "x"], true, false, 2, None),
            (&["{", "}"], false, false, 0, None),
        ] {
            let all = frames.concat();
            let frames: Vec<_> = frames
                .iter()
                .map(|frame| Ok::<_, BoxError>((*frame).to_owned()))
                .collect();
            let frames = stream::iter(frames);
            let sent = if is_open {
                Body::from_stream(frames.chain(stream::pending()))
            } else {
                Body::from_stream(frames)
            };
            let context = context();
            let mut body = ReplayBody::new(sent, &budget(0, 0), is_create.then_some(&context));
            body.read_ahead().await.unwrap();
            assert_eq!(body.arrived(), arrived, "{} bytes", all.len());
            assert_eq!(context.external_id(), external_id);
            let mut read = String::new();
            while let Some(Some(frame)) = body.frame().now_or_never() {
                read.push_str(str::from_utf8(frame.unwrap().data_ref().unwrap()).unwrap());
            }
            assert!(read == all, "read {} of {} bytes", read.len(), all.len());
        }
    }

    #[tokio::test]
    async fn body_that_was_read_ahead_to_its_end_is_not_at_its_end() {
        for whole in [Body::from("abcd"), chunks(&["ab", "cd"])] {
            let body = ReplayBody::new(whole, &budget(10_000, 10_000), None);
            assert!(body.read_while(|| true).now_or_never().is_none());
            assert!(!body.is_end_stream());
            assert_eq!(rest(body).await, Ok("abcd".to_owned()));
        }
    }

    #[tokio::test]
    async fn failure_of_a_body_is_noticed_before_it_is_sent() {
        let failing = || {
            let frames = [Ok("ab"), Err(BoxError::from("the client has left"))];
            Body::from_stream(stream::iter(frames))
        };
        let body = ReplayBody::new(failing(), &budget(10_000, 10_000), None);
        assert!(body.read_while(|| true).now_or_never().is_some());
        let body = ReplayBody::new(failing(), &budget(10_000, 10_000), Some(&context()));
        assert!(body.read_ahead().await.is_err());
    }

    #[tokio::test]
    async fn body_is_read_ahead_while_the_limits_have_room() {
        let frame = size_of::<Frame<Bytes>>() as u64;
        for (body, memory, arrived) in [
            (frame, 10_000, 1),
            (frame + 2, 10_000, 2),
            (10_000, frame, 1),
            (10_000, frame + 2, 2),
            // The declared length is above the limit.
            (3, 10_000, 0),
        ] {
            let declared = Body::new(Declared(chunks(&["a", "b", "c"]), 3));
            let read = ReplayBody::new(declared, &budget(body, memory), None);
            assert!(read.read_while(|| true).now_or_never().is_none());
            assert_eq!(read.arrived(), arrived, "limits {body} and {memory}");
        }
    }

    #[test]
    fn table_of_limits_holds() {
        // Bytes in use, least length of the body, bytes to keep: do they fit?
        for (used, all, more, fits) in [
            (0, 5, 5, true),
            (0, 6, 3, false),
            (5, 5, 5, true),
            (6, 5, 5, false),
            (10, 1, 1, false),
        ] {
            let budget = budget(5, 10);
            budget.reserve(used);
            assert_eq!(budget.take(all, more), fits, "{used} {all} {more}");
            let taken = if fits { used + more } else { used };
            assert_eq!(budget.used.load(Relaxed), taken as u64);
        }
        // Bytes in use, declared length, bytes read ahead: is there room for more?
        for (used, all, ahead, has_room) in [
            (0, 0, 0, true),
            (9, 4, 4, true),
            (10, 0, 0, false),
            (0, 5, 0, false),
            (0, 0, 5, false),
            (10, 5, 5, false),
        ] {
            let budget = budget(5, 10);
            budget.reserve(used);
            assert_eq!(
                budget.has_room(all, ahead),
                has_room,
                "{used} {all} {ahead}"
            );
        }
    }

    #[test]
    fn new_limits_apply_to_what_is_read_from_then_on() {
        let budget = budget(5, 5);
        assert!(budget.take(5, 5));
        for (body, memory, fits) in [(5, 9, false), (5, 10, true), (4, 20, false)] {
            budget.set_limits(ReplayLimits {
                body: ByteSize::b(body),
                memory: ByteSize::b(memory),
            });
            assert_eq!(budget.take(5, 5), fits, "limits {body} and {memory}");
        }
    }
}
