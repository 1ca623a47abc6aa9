//! Steps of one simulated run.

use fastrand::Rng;

/// All steps of a run. Times are in milliseconds of simulated time.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) protocol: Protocol,
    /// True if a connection is kept ready.
    pub(crate) keep_warm: bool,
    /// Wishes of the users, one for each client.
    pub(crate) wishes: Vec<Wish>,
    /// Outcomes of the connections to upstream, in their order. Further connections open at once.
    pub(crate) dials: Vec<Dialing>,
    /// End of the proxy, if it comes before everything is over.
    pub(crate) end: Option<Ending>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Protocol {
    Http1,
    Http2 {
        /// Most streams that upstream allows at once.
        streams: u32,
        /// Bytes of a body that upstream accepts before it opens the window.
        window: u32,
    },
}

/// Task that a user wants, or information that they want.
#[derive(Clone, Debug)]
pub(crate) struct Wish {
    pub(crate) at: u64,
    pub(crate) kind: Kind,
    /// Bytes of the body without its external id; 0 for no body at all.
    pub(crate) size: usize,
    /// Pause of the client inside its body.
    pub(crate) pause: u64,
    /// Patience of the client in each try. After it the client leaves, and begins the next try if there is
    /// one.
    pub(crate) tries: Vec<u64>,
    /// Reactions of upstream to the requests for this wish, in the order in which they arrive. Further
    /// requests get a response at once.
    pub(crate) replies: Vec<Reply>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Create,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Dialing {
    Opens(u64),
    Refused(u64),
    Silent,
}

/// Reaction of upstream to a request that arrives.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Reply {
    /// Makes a task and responds after `after`, with a pause inside the response.
    Answer { after: u64, pause: u64 },
    /// Makes a task, and breaks off inside the response.
    CutOff { after: u64 },
    /// Refuses the request with this code, without a task.
    Refuse { code: u16, after: u64 },
    /// Makes a task, and responds with this code.
    Fail { code: u16, after: u64 },
    /// Responds with an error before the body has arrived, without a task.
    Early,
    /// Breaks the connection when the request begins to arrive.
    LoseBefore,
    /// Makes a task, and breaks the connection or the stream.
    LoseAfter { after: u64 },
    /// Makes a task, and never responds.
    Silence,
    /// Refuses the stream. With HTTP/1.1 it acts like `LoseBefore`.
    RefuseStream,
}

/// Time at which the proxy is told to end, and its `drain`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ending {
    pub(crate) at: u64,
    pub(crate) drain: u64,
}

// === impl Plan ===

impl Plan {
    pub(crate) fn of(seed: u64) -> Self {
        let rng = &mut Rng::with_seed(seed);
        let protocol = if rng.bool() {
            Protocol::Http1
        } else {
            Protocol::Http2 {
                streams: one_of(rng, &[1, 1, 2, 100]),
                window: one_of(rng, &[10, 1_000, 65_535]),
            }
        };
        let largest = protocol.largest_body();
        Self {
            seed,
            protocol,
            keep_warm: rng.bool(),
            wishes: (0..rng.usize(1..8))
                .map(|_| Wish::any(largest, rng))
                .collect(),
            dials: (0..rng.usize(0..6)).map(|_| Dialing::any(rng)).collect(),
            end: (rng.u8(..3) == 0).then(|| Ending {
                at: rng.u64(..10_000),
                drain: one_of(rng, &[100, 1_000, 25_000]),
            }),
        }
    }

    /// Returns the same plan with one step less, or with a simpler step.
    pub(crate) fn smaller(&self) -> impl Iterator<Item = Self> {
        let mut plans = Vec::new();
        let mut with = |change: &dyn Fn(&mut Self)| {
            let mut plan = self.clone();
            change(&mut plan);
            plans.push(plan);
        };
        for index in 0..self.wishes.len() {
            with(&|plan| _ = plan.wishes.remove(index));
        }
        for index in 0..self.dials.len() {
            with(&|plan| _ = plan.dials.remove(index));
        }
        if self.end.is_some() {
            with(&|plan| plan.end = None);
        }
        if self.keep_warm {
            with(&|plan| plan.keep_warm = false);
        }
        for (index, wish) in self.wishes.iter().enumerate() {
            if wish.tries.len() > 1 {
                with(&|plan| _ = plan.wishes[index].tries.pop());
            }
            if wish.pause > 0 {
                with(&|plan| plan.wishes[index].pause = 0);
            }
            if wish.size > 10 {
                with(&|plan| plan.wishes[index].size = 10);
            }
            for reply in 0..wish.replies.len() {
                with(&|plan| _ = plan.wishes[index].replies.remove(reply));
            }
        }
        plans.into_iter()
    }
}

// === impl Protocol ===

impl Protocol {
    /// Returns the largest body that does not take too many steps.
    fn largest_body(self) -> usize {
        match self {
            Self::Http1 => usize::MAX,
            Self::Http2 { window, .. } => 30 * window as usize,
        }
    }
}

// === impl Wish ===

impl Wish {
    fn any(largest: usize, rng: &mut Rng) -> Self {
        let kind = if rng.u8(..4) == 0 {
            Kind::Read
        } else {
            Kind::Create
        };
        let size = match (kind, rng.u8(..20)) {
            (Kind::Read, _) | (_, 0) => 0,
            (_, 1) => 1_200_000,
            (_, 2..6) => 100_000,
            _ => 10,
        };
        Self {
            at: rng.u64(..5_000),
            kind,
            size: size.min(largest),
            pause: if rng.u8(..4) == 0 { delay(rng) } else { 0 },
            tries: (0..rng.usize(1..4)).map(|_| patience(rng)).collect(),
            replies: (0..rng.usize(..4)).map(|_| Reply::any(rng)).collect(),
        }
    }
}

// === impl Dialing ===

impl Dialing {
    fn any(rng: &mut Rng) -> Self {
        match rng.u8(..6) {
            0 => Self::Silent,
            1 | 2 => Self::Refused(delay(rng)),
            _ => Self::Opens(delay(rng)),
        }
    }
}

// === impl Reply ===

impl Reply {
    fn any(rng: &mut Rng) -> Self {
        let after = delay(rng);
        match rng.u8(..20) {
            0..5 => Self::Answer {
                after,
                pause: if rng.bool() { delay(rng) } else { 0 },
            },
            5 => Self::CutOff { after },
            6..11 => Self::Refuse {
                code: one_of(rng, &[1302, 1303, 1303, 1003, 1102]),
                after,
            },
            11 | 12 => Self::Fail {
                code: one_of(rng, &[5000, 5001]),
                after,
            },
            13 => Self::Early,
            14 => Self::LoseBefore,
            15 | 16 => Self::LoseAfter { after },
            17 => Self::Silence,
            _ => Self::RefuseStream,
        }
    }
}

fn one_of<T: Copy>(rng: &mut Rng, all: &[T]) -> T {
    all[rng.usize(..all.len())]
}

/// Returns a delay that is usually short, and sometimes longer than one of the proxy's time limits.
fn delay(rng: &mut Rng) -> u64 {
    match rng.u8(..10) {
        0..3 => 0,
        3..7 => rng.u64(1..1_000),
        7 | 8 => rng.u64(1_000..10_000),
        _ => rng.u64(10_000..90_000),
    }
}

fn patience(rng: &mut Rng) -> u64 {
    match rng.u8(..10) {
        0..4 => rng.u64(1..3_000),
        4..6 => rng.u64(3_000..70_000),
        _ => 600_000,
    }
}
