//! Clients that want one task each, and send their create again: as told, or after they have left, or
//! at their own risk.

use std::{net::SocketAddr, time::Duration};

use fastrand::Rng;
use serde_json::json;
use tokio::time::Instant;

use super::kling::{Kling, is_create, rng, task};
use crate::support::{Connection, documented, get, is_cut_off, request};

/// The most requests for one task.
const TRIES: usize = 4;
/// How often a client that waits for an answer looks whether upstream has its request.
const LOOK: Duration = Duration::from_millis(20);
/// The default of `retry.replay_body`: what is larger is sent once.
pub(super) const REPLAY_BODY: usize = 1 << 20;

/// A task that somebody wants, or a poll. The name says which.
pub(super) struct Order {
    pub(super) name: String,
}

/// When a client leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Leave {
    /// Right after the body.
    AtOnce,
    /// When upstream has the beginning of its request.
    Begun,
}

/// A request, and how it went for its client.
#[derive(Debug)]
pub(super) struct Try {
    pub(super) name: String,
    pub(super) outcome: Outcome,
    pub(super) took: Duration,
    /// Of its body, in bytes.
    pub(super) size: usize,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Well,
    /// An error in the documented form.
    Failed {
        retryable: bool,
        attempts: u64,
    },
    /// No connection, or one that ended before its answer was whole; and whether the proxy was ending
    /// by then.
    Broken {
        ending: bool,
    },
    /// It left without an answer.
    Left,
    /// Anything else, which is wrong.
    Wrong(String),
}

// === impl Leave ===

impl Leave {
    /// When the client of a request leaves, if it does.
    pub(super) fn of(seed: u64, name: &str) -> Option<Self> {
        let mut rng = rng(seed, ("leave", name));
        let leaves = is_create(name) && !name.ends_with(&format!(".{TRIES}")) && rng.u8(..100) < 16;
        leaves.then(|| rng.choice([Self::AtOnce, Self::Begun]).unwrap())
    }

    /// Waits until it is time, or there is an answer.
    fn wait(self, kling: &Kling, name: &str, connection: &mut Connection) {
        let has_begun = || kling.books.pages().requests.contains_key(name);
        while self == Self::Begun && !has_begun() && !connection.is_answered_within(LOOK) {}
    }
}

// === impl Order ===

impl Order {
    /// Creates and polls in a random order.
    pub(super) fn all(count: u64, seed: u64) -> Vec<Self> {
        let name = |index| [format!("create-{index}"), format!("poll-{index}")];
        let names = (0..count).flat_map(name);
        let mut orders: Vec<_> = names.map(|name| Self { name }).collect();
        rng(seed, 0).shuffle(&mut orders);
        orders
    }

    /// Asks for it, and again as clients do.
    pub(super) fn place(
        &self,
        kling: &Kling,
        proxy: SocketAddr,
        kept: &mut Option<Connection>,
    ) -> Vec<Try> {
        let body = self.body(kling.seed);
        let (mut tries, mut half_closed) = (Vec::new(), Vec::new());
        for number in 1..=TRIES {
            let name = format!("{}.{number}", self.name);
            let mut rng = rng(kling.seed, ("client", &name));
            let begun = Instant::now();
            let connection = kept.take().map_or_else(|| Connection::try_to(proxy), Ok);
            let outcome = match (connection, Leave::of(kling.seed, &name)) {
                (Err(_), _) => Outcome::broken(kling),
                (Ok(mut connection), Some(leave)) => {
                    connection.send(bytes(&name, &body));
                    leave.wait(kling, &name, &mut connection);
                    if rng.bool() {
                        connection.half_close();
                        half_closed.push(connection);
                    }
                    Outcome::Left
                }
                (Ok(mut connection), None) => {
                    connection.send(bytes(&name, &body));
                    let outcome = Outcome::of(&name, &mut connection, kling);
                    let keep = outcome == Outcome::Well && rng.bool();
                    *kept = keep.then_some(connection);
                    outcome
                }
            };
            let took = begun.elapsed();
            kling.client_is_done(&name, outcome == Outcome::Left);
            let again = is_create(&name) && outcome.is_to_be_repeated(&mut rng);
            let size = body.len();
            tries.push(Try {
                name,
                outcome,
                took,
                size,
            });
            if !again {
                break;
            }
        }
        tries
    }

    /// The same for each request.
    fn body(&self, seed: u64) -> String {
        let mut rng = rng(seed, ("body", &self.name));
        let size = match rng.u8(..100) {
            0 => REPLAY_BODY + REPLAY_BODY / 8,
            1..10 => rng.usize(..200_000),
            _ => rng.usize(..1_000),
        };
        let body = json!({ "external_task_id": self.name, "prompt": "a cat ".repeat(size / 6) });
        body.to_string()
    }
}

// === impl Outcome ===

impl Outcome {
    /// Reads the answer to a request.
    fn of(name: &str, connection: &mut Connection, kling: &Kling) -> Self {
        let answer = match connection.try_answer() {
            Ok(answer) => answer,
            answer if is_cut_off(&answer) => return Self::broken(kling),
            Err(error) => return Self::Wrong(format!("no answer: {error}")),
        };
        if answer.status() == 200 {
            if answer.json()["data"]["task_id"] == task(name) {
                return Self::Well;
            }
            return Self::Wrong(format!("another's answer: {answer:?}"));
        }
        let [attempts] = answer.error(["attempts"]);
        match (documented(&answer), attempts.as_u64()) {
            (Some(retryable), Some(attempts)) => Self::Failed {
                retryable,
                attempts,
            },
            _ => Self::Wrong(format!("undocumented: {answer:?}")),
        }
    }

    fn broken(kling: &Kling) -> Self {
        let ending = kling.books.pages().ending;
        Self::Broken { ending }
    }

    /// A client that has left asks again, and so does one that is told that it may. Of those that do
    /// not know what became of their create, some do.
    fn is_to_be_repeated(&self, rng: &mut Rng) -> bool {
        let risk = rng.u8(..4) == 0;
        match self {
            Self::Left => true,
            Self::Failed { retryable, .. } => *retryable || risk,
            Self::Broken { ending } => !ending && risk,
            Self::Well | Self::Wrong(_) => false,
        }
    }
}

/// A request on the wire.
fn bytes(name: &str, body: &str) -> Vec<u8> {
    if !is_create(name) {
        return get(&format!("/v1/videos/{name}"));
    }
    let headers = format!("content-type: application/json\nx-request-id: {name}");
    request(&format!("POST /v1/videos/{name}"), &headers, body)
}
