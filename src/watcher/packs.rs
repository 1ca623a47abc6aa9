//! The resource packs of the account, from `GET /account/costs`.
//!
//! The answer is read as `aself101/kling-api` has measured it: a second envelope in `data`, and one entry per
//! pack. The remaining units may lag by 12 hours (Kling's page "Account Usage").

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;

use crate::kling::family::Pool;
use crate::tasks::record::{DEFAULT_ACCOUNT, Timestamp};
use crate::telemetry::metrics::Metrics;

/// The latest read of the packs, and the warnings that it has led to.
pub(super) struct Packs {
    metrics: Arc<Metrics>,
    /// Time of the next read; `None` before the first one.
    next: Option<Instant>,
    /// Warnings that hold, so that each is logged once.
    warned: HashSet<String>,
}

/// The packs in an answer.
#[derive(Debug, PartialEq)]
struct Account {
    online: Vec<Pack>,
    /// True if the account has any pack. One that pays later has none.
    has_packs: bool,
}

/// One online pack, or several of the same name together.
#[derive(Debug, PartialEq)]
struct Pack {
    name: String,
    total: f64,
    left: f64,
    end: Timestamp,
}

/// Time between two reads. Each differs from it by up to a fifth, so that many proxies do not ask together.
const INTERVAL: Duration = Duration::from_hours(1);
/// Time before the end of a pack at which a warning is logged.
const SOON: Duration = Duration::from_hours(7 * 24);
/// Part of a pack below which a warning is logged.
const LITTLE: f64 = 0.1;
/// Most packs that become metrics.
const MOST: usize = 50;
/// Longest name of a pack in a metric, in bytes.
const LONGEST_NAME: usize = 64;
/// Time before now at which the read begins: deductions before it are of no interest here.
const PERIOD: Duration = Duration::from_hours(24);

/// Returns the target of the read.
pub(super) fn target(now: Timestamp) -> String {
    let start = now.before(PERIOD).0;
    format!("/account/costs?start_time={start}&end_time={}", now.0)
}

// === impl Packs ===

impl Packs {
    pub(super) fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            metrics,
            next: None,
            warned: HashSet::new(),
        }
    }

    /// Returns true if it is time for a read.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.next.is_none_or(|next| now >= next)
    }

    /// Takes over an answer; `None` if the read failed, which changes nothing. `in_use` are the types of packs
    /// that tasks take from.
    pub(super) fn read(
        &mut self,
        costs: Option<&Value>,
        now: Timestamp,
        in_use: &[Pool],
        at: Instant,
    ) {
        let spread = 0.8 + 0.4 * fastrand::f64();
        self.next = Some(at + INTERVAL.mul_f64(spread));
        let Some(account) = costs.and_then(Account::read) else {
            return;
        };
        let packs = &account.online;
        let rows = packs
            .iter()
            .map(|pack| (&*pack.name, pack.left, pack.end.0));
        self.metrics.packs(DEFAULT_ACCOUNT, rows);
        let warnings = account.warnings(now, in_use);
        for warning in &warnings {
            if self.warned.insert(warning.clone()) {
                tracing::warn!(account = DEFAULT_ACCOUNT, "{warning}");
            }
        }
        self.warned.retain(|warning| warnings.contains(warning));
    }
}

// === impl Account ===

impl Account {
    /// Reads an answer; `None` if it is not about packs.
    fn read(costs: &Value) -> Option<Self> {
        let packs = costs["data"]["resource_pack_subscribe_infos"].as_array()?;
        let mut online: Vec<Pack> = Vec::new();
        for pack in packs.iter().filter(|pack| pack["status"] == "online") {
            let Some(pack) = Pack::read(pack) else {
                continue;
            };
            // Whoever buys the same pack twice has two of one name.
            if let Some(known) = online.iter_mut().find(|known| known.name == pack.name) {
                known.add(&pack);
            } else if online.len() < MOST {
                online.push(pack);
            }
        }
        Some(Self {
            online,
            has_packs: !packs.is_empty(),
        })
    }

    /// Returns what the owner of the account should know.
    fn warnings(&self, now: Timestamp, in_use: &[Pool]) -> Vec<String> {
        let mut warnings = Vec::new();
        for Pack {
            name,
            total,
            left,
            end,
        } in &self.online
        {
            if end.since(now) < SOON {
                warnings.push(format!("the resource pack {name} ends at {end}"));
            }
            if *left < total * LITTLE {
                warnings.push(format!(
                    "less than a tenth of the resource pack {name} is left"
                ));
            }
        }
        for kind in in_use.iter().map(|pool| pool.as_str()) {
            // The name of a pack has its type: `Trial-Video-100Units-5Con-1Months`.
            let is_kind = |pack: &Pack| pack.name.to_ascii_lowercase().contains(kind);
            if self.has_packs && !self.online.iter().any(is_kind) {
                warnings.push(format!("no resource pack for {kind} tasks is online"));
            }
        }
        warnings
    }
}

// === impl Pack ===

impl Pack {
    /// Adds another pack of the same name. The end is that of the one that ends first.
    fn add(&mut self, other: &Self) {
        self.total += other.total;
        self.left += other.left;
        self.end = self.end.min(other.end);
    }

    fn read(pack: &Value) -> Option<Self> {
        let mut name = pack["resource_pack_name"].as_str()?.to_owned();
        name.truncate(name.floor_char_boundary(LONGEST_NAME));
        Some(Self {
            name,
            total: pack["total_quantity"].as_f64()?,
            left: pack["remaining_quantity"].as_f64()?,
            end: Timestamp(pack["invalid_time"].as_i64()?),
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const NOW: Timestamp = Timestamp(1_800_000_000_000);

    fn pack(name: &str, left: f64, days: u64, status: &str) -> Value {
        let end = NOW.after(Duration::from_hours(24 * days)).0;
        json!({
            "resource_pack_name": name, "total_quantity": 100.0, "remaining_quantity": left,
            "invalid_time": end, "status": status,
        })
    }

    fn costs(packs: &[Value]) -> Value {
        json!({ "code": 0, "data": { "code": 0, "resource_pack_subscribe_infos": packs } })
    }

    #[test]
    fn online_packs_become_metrics_and_all_others_do_not() {
        let metrics = Arc::new(Metrics::new().unwrap());
        let mut packs = Packs::new(Arc::clone(&metrics));
        let now = Instant::now();
        assert!(packs.is_due(now));
        let answer = costs(&[
            pack("Trial-Video-100Units-5Con-1Months", 42.5, 30, "online"),
            pack("Old", 0.0, 30, "expired"),
            pack("Twice", 1.0, 30, "online"),
            pack("Twice", 2.0, 40, "online"),
            pack(&"x".repeat(100), 1.0, 30, "online"),
        ]);
        packs.read(Some(&answer), NOW, &[], now);
        let text = metrics.render().unwrap();
        let line = "kling_proxy_pack_units_left{account=\"default\",pack=\"Trial-Video-100Units-5Con-1Months\"} 42.5";
        assert!(text.contains(line), "{text}");
        assert!(text.contains(&"x".repeat(64)) && !text.contains(&"x".repeat(65)));
        assert!(!text.contains("pack=\"Old\""));
        assert!(text.contains("pack=\"Twice\"} 3\n"), "{text}");
        assert!(!packs.is_due(now + INTERVAL.mul_f64(0.79)));
        assert!(packs.is_due(now + INTERVAL.mul_f64(1.21)));
        // A pack that is gone has no metric any more, and a failure changes nothing.
        packs.read(Some(&costs(&[])), NOW, &[], now);
        assert!(!metrics.render().unwrap().contains("pack="));
        packs.read(None, NOW, &[], now);
    }

    #[test]
    fn owner_is_warned_in_time() {
        let video = "Trial-Video-100Units-5Con-1Months";
        for (answer, in_use, expected) in [
            (
                costs(&[pack(video, 50.0, 8, "online")]),
                &[Pool::Video][..],
                vec![],
            ),
            (
                costs(&[pack(video, 9.9, 6, "online")]),
                &[Pool::Video],
                vec![
                    format!("the resource pack {video} ends at 2027-01-21T08:00:00Z"),
                    format!("less than a tenth of the resource pack {video} is left"),
                ],
            ),
            (
                costs(&[pack(video, 50.0, 8, "online")]),
                &[Pool::Video, Pool::Image],
                vec!["no resource pack for image tasks is online".to_owned()],
            ),
            // An account that pays later has no packs.
            (costs(&[]), &[Pool::Video], vec![]),
            (
                costs(&[pack(video, 0.0, 1, "runOut")]),
                &[Pool::Video],
                vec!["no resource pack for video tasks is online".to_owned()],
            ),
        ] {
            let account = Account::read(&answer).unwrap();
            assert_eq!(account.warnings(NOW, in_use), expected, "{answer}");
        }
        assert_eq!(Account::read(&json!({ "code": 1002 })), None);
    }
}
