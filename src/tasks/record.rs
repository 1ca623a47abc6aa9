//! The record of one create and its task: the row of the store.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::HeaderValue;
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};

use super::state::TaskState;
use super::store::Observation;
use super::units::Units;
use crate::kling::family::{Family, Pool};
use crate::kling::task::Order;
use crate::kling::task_answer::ResultFile;

/// Name of the account whose key pays, if the settings name no other account.
pub const DEFAULT_ACCOUNT: &str = "default";

/// Longest time by which a task may seem to be older than its create, because clocks differ.
pub const SKEW: Duration = Duration::from_mins(5);

/// All that the proxy remembers of one create. It has no prompt, no picture, no body and no secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskRecord {
    /// The proxy's own id, which a create has from its arrival on.
    pub reference: TaskRef,
    /// Number of the last change, from the counter of the store; 0 before the first one is stored.
    pub change: u64,
    pub state: TaskState,
    /// Name of the account that pays.
    pub account: String,
    /// Name of the client; empty if clients have no names.
    pub client: String,
    /// Id of the client's request.
    pub request_id: String,
    /// Kling's own id of the answer to the create.
    pub upstream_request_id: Option<String>,
    /// Kling's id of the task, once Kling has made it.
    pub task_id: Option<String>,
    /// Id of the task that the client, or the proxy, has chosen.
    pub external_id: Option<String>,
    /// Name of the family; `None` if the path is not in the family table.
    pub family: Option<String>,
    /// Path of the create, without its query.
    pub path: String,
    /// Members of the body that decide the price of the task.
    pub order: Order,
    /// Pack type whose slots the task holds.
    pub pool: Option<Pool>,
    /// Number of slots that it holds.
    pub weight: u32,
    /// Place in the queue, while the create waits for a slot.
    pub place: Option<u64>,
    /// Units that are reserved for the task until its end.
    pub reserved: Option<Units>,
    /// Units that the task cost.
    pub units: Option<Units>,
    /// HMAC of the request, under the key of the store.
    pub request_digest: Option<Vec<u8>>,
    /// HMAC of the idempotency key, under the key of the store.
    pub key_digest: Option<Vec<u8>>,
    pub created_at: Timestamp,
    pub sent_at: Option<Timestamp>,
    pub ended_at: Option<Timestamp>,
    /// Reason for a create without a task, or for a task without results.
    pub error: Option<TaskError>,
    pub results: Vec<TaskResult>,
}

/// Reason for a create without a task, or for a task without results.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TaskError {
    /// The create was refused: the members of `error` in the answer to its client.
    Refused(Box<RefusedCreate>),
    /// The task failed, with Kling's message.
    Failed { message: String },
}

/// Reason for which a create made no task. The facts about its code are in the table of service codes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedCreate {
    /// Service code: Kling's, or the proxy's own.
    pub code: i64,
    #[serde(rename = "type")]
    pub kind: String,
    pub message: String,
    /// HTTP status of upstream's answer; `None` if there was none.
    pub upstream_status: Option<u16>,
    /// True if the client may send the create again.
    pub retryable: bool,
    /// Number of attempts to send it.
    pub attempts: u32,
}

/// One file that a task made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskResult {
    /// `video`, `image` or `audio`.
    pub kind: String,
    /// Place among the results of the task, from 0.
    pub index: u32,
    /// Address of the file. Whoever has it can fetch the file until it expires.
    pub url: String,
    /// Time at which Kling deletes the file.
    pub expires_at: Option<Timestamp>,
    /// True for the copy with a watermark.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub watermarked: bool,
}

/// The proxy's own id of a create: `t_` and 20 characters.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TaskRef(String);

/// A time in milliseconds since 1970, UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Timestamp(pub i64);

/// Characters of a [`TaskRef`]: 32 that cannot be mistaken for each other.
const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
/// Longest path that is stored, in bytes.
const LONGEST_PATH: usize = 256;
/// Random characters of a [`TaskRef`]: 100 bits.
const RANDOM: usize = 20;

// === impl TaskRecord ===

impl TaskRecord {
    /// Starts the record of a create with this path.
    pub fn new(request_id: &str, path: &str, now: Timestamp) -> Self {
        let family = Family::of_create(path);
        let mut path = path.to_owned();
        path.truncate(path.floor_char_boundary(LONGEST_PATH));
        Self {
            reference: TaskRef::random(),
            change: 0,
            state: TaskState::Sending,
            account: DEFAULT_ACCOUNT.to_owned(),
            client: String::new(),
            request_id: request_id.to_owned(),
            upstream_request_id: None,
            task_id: None,
            external_id: None,
            family: family.map(Family::name),
            path,
            order: Order::default(),
            pool: family.and_then(|family| family.pool),
            weight: 1,
            place: None,
            reserved: None,
            units: None,
            request_digest: None,
            key_digest: None,
            created_at: now,
            sent_at: None,
            ended_at: None,
            error: None,
            results: Vec::new(),
        }
    }

    /// Takes over what a newer report of the same create says. Returns false if it says nothing new.
    ///
    /// A report holds all that its process knows, so it may be repeated, and an earlier one may be lost.
    pub fn merge(&mut self, report: &Self) -> bool {
        if self.has_no_task() {
            return false;
        }
        let before = self.clone();
        if self.state.accepts(report.state) {
            self.state = report.state;
            self.ended_at = report.ended_at;
            self.error.clone_from(&report.error);
            self.place = report.place;
        }
        adopt(
            &mut self.upstream_request_id,
            report.upstream_request_id.as_ref(),
        );
        adopt(&mut self.task_id, report.task_id.as_ref());
        adopt(&mut self.external_id, report.external_id.as_ref());
        self.weight = report.weight;
        self.order.clone_from(&report.order);
        adopt(&mut self.sent_at, report.sent_at.as_ref());
        adopt(&mut self.units, report.units.as_ref());
        if self.results.is_empty() {
            self.results.clone_from(&report.results);
        }
        *self != before
    }

    /// Takes over what an answer from Kling says of the task. Returns false if it says nothing new.
    pub fn observe(&mut self, seen: &Observation) -> bool {
        if self.has_no_task() {
            return false;
        }
        let before = self.clone();
        if self.state.accepts(seen.state) {
            self.state = seen.state;
            self.ended_at = seen.state.is_ended().then_some(seen.at);
            let message = seen.message.clone().filter(|message| !message.is_empty());
            self.error = (seen.state == TaskState::Failed).then(|| TaskError::Failed {
                message: message.unwrap_or_default(),
            });
        }
        adopt(&mut self.task_id, Some(&seen.task_id));
        adopt(&mut self.external_id, seen.external_id.as_ref());
        adopt(&mut self.units, seen.units.as_ref());
        if self.results.is_empty() {
            self.results.clone_from(&seen.results);
        }
        *self != before
    }

    /// Returns true if it is certain that the create made no task.
    fn has_no_task(&self) -> bool {
        matches!(self.state, TaskState::Rejected | TaskState::Canceled)
    }
}

/// Fills a gap. A value that is known stays.
fn adopt<T: Clone>(known: &mut Option<T>, news: Option<&T>) {
    if known.is_none() {
        *known = news.cloned();
    }
}

// === impl TaskRef ===

impl TaskRef {
    /// Makes a new reference from random bits.
    pub fn random() -> Self {
        let mut bytes = [0; RANDOM];
        if SystemRandom::new().fill(&mut bytes).is_err() {
            // The system has no random bits. References must differ, but need not be secret.
            bytes.fill_with(|| fastrand::u8(..));
        }
        let letters = bytes.map(|byte| char::from(ALPHABET[usize::from(byte % 32)]));
        Self(["t_", &String::from_iter(letters)].concat())
    }

    /// Takes a reference from the store.
    pub fn stored(text: String) -> Self {
        Self(text)
    }

    /// Returns the reference as the value of a header.
    pub fn to_header(&self) -> HeaderValue {
        // Letters and digits only, unless somebody else has written to the store.
        HeaderValue::from_str(&self.0).unwrap_or(HeaderValue::from_static(""))
    }

    /// Returns the reference as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TaskRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

// === impl TaskResult ===

impl From<ResultFile> for TaskResult {
    fn from(file: ResultFile) -> Self {
        Self {
            kind: file.kind.to_owned(),
            index: file.index.try_into().unwrap_or(u32::MAX),
            expires_at: expiry(&file.url),
            url: file.url,
            watermarked: file.watermarked,
        }
    }
}

/// Returns the time at which a signed address ends: its parameter `Expires`, in seconds since 1970.
fn expiry(url: &str) -> Option<Timestamp> {
    let (_, query) = url.split_once('?')?;
    let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    let (_, seconds) = pairs.find(|(name, _)| *name == "Expires")?;
    let seconds: i64 = seconds.parse().ok()?;
    Some(Timestamp(seconds.checked_mul(1000)?))
}

// === impl Timestamp ===

impl Timestamp {
    /// Returns this time plus a duration.
    pub fn after(self, duration: Duration) -> Self {
        Self(
            self.0
                .saturating_add(duration.as_millis().try_into().unwrap_or(i64::MAX)),
        )
    }

    /// Returns this time minus a duration.
    pub fn before(self, duration: Duration) -> Self {
        Self(
            self.0
                .saturating_sub(duration.as_millis().try_into().unwrap_or(i64::MAX)),
        )
    }

    /// Returns the time since an earlier one; zero if that is later.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0).try_into().unwrap_or(0))
    }
}

impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Self {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(since.as_millis().try_into().unwrap_or(i64::MAX))
    }
}

/// Writes the time in RFC 3339, in whole seconds.
impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The last second of the year 9999, which is the last that RFC 3339 can write.
        const LAST: u64 = 253_402_300_799;
        let seconds = u64::try_from(self.0 / 1000).unwrap_or(0).min(LAST);
        let time = UNIX_EPOCH + Duration::from_secs(seconds);
        humantime::format_rfc3339_seconds(time).fmt(f)
    }
}
