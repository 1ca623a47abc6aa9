//! Keeps one client from using the whole limit of requests in flight.
//!
//! With client tokens, all requests whose tokens have the same name are one client. Without tokens, a client
//! is an address outside this machine, or another user of this machine; all that this machine's own programs
//! send by loopback is one client. If several clients are possible, each leaves an eighth of the limit to the
//! others, and half of it if another client sent a request not long ago. A new client can therefore send a
//! request at once, and soon up to half of the limit.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::time::Instant;

use crate::clock::last_seen::LastSeen;

/// Requests in flight, counted per client.
pub struct Shares {
    /// Requests in flight of all clients that are known by their address or user.
    foreign: Arc<AtomicU64>,
    /// Shares of the clients that are known by their address or user.
    peers: Mutex<HashMap<Peer, Weak<Share>>>,
    /// Client that sent the latest request, or [`NOBODY`].
    latest: AtomicU64,
    /// Time of the latest request that came from another client than the request before it.
    change: LastSeen,
}

/// Requests in flight of one client.
pub struct Share {
    /// Identifies the client: a hash of its token's name, address or user.
    client: u64,
    held: AtomicU64,
    /// Sum over all clients that are known by their address or user; shared with [`Shares`].
    foreign: Arc<AtomicU64>,
}

/// One request that counts in a client's share until this value is dropped.
pub struct Held(Arc<Share>);

/// Client without a token that is not a program of our own user on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Peer {
    /// IPv4 address, or network of an IPv6 address, because a machine may choose any address in its network.
    Address(IpAddr),
    /// User of this machine, by its number (uid).
    User(u32),
}

/// Refusal because too many requests are in flight: of all clients together, or of this client.
#[derive(Debug)]
pub struct NoPlace;

/// Client number that means that no request has come yet.
const NOBODY: u64 = 0;
/// Client number of this machine's own programs, if they show no token.
const LOCAL: u64 = 1;
/// Time after a change between clients during which each client is held to half of the limit.
const WANTED: Duration = Duration::from_secs(10);
/// Number of peers from which on those with no request in flight are removed from the map.
const MANY_PEERS: usize = 1024;
/// Mask of the part of an IPv6 address that names a network (RFC 4291, section 2.5.4).
const NETWORK: u128 = u128::MAX << 64;

// === impl Shares ===

impl Shares {
    pub fn new() -> Self {
        Self {
            foreign: Arc::default(),
            peers: Mutex::default(),
            latest: AtomicU64::new(NOBODY),
            change: LastSeen::never(),
        }
    }

    /// Returns the share of a peer, which is new if the peer has no request in flight.
    pub fn of(&self, peer: Peer) -> Arc<Share> {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(share) = peers.get(&peer).and_then(Weak::upgrade) {
            return share;
        }
        if peers.len() >= MANY_PEERS {
            peers.retain(|_, share| share.strong_count() > 0);
        }
        let share = Arc::new(Share {
            foreign: Arc::clone(&self.foreign),
            ..Share::of(peer)
        });
        peers.insert(peer, Arc::downgrade(&share));
        share
    }

    /// Counts a request in the share of its client; `share` is `None` for this machine's own programs.
    /// `in_flight` is the number of all requests in flight, with this one, and `limit` their largest number.
    ///
    /// # Errors
    ///
    /// [`NoPlace`] if the limit or the client's part of it is used up.
    pub fn take(
        &self,
        share: Option<Arc<Share>>,
        in_flight: u64,
        limit: u64,
    ) -> Result<Option<Held>, NoPlace> {
        let is_wanted = self.is_wanted(share.as_ref().map_or(LOCAL, |share| share.client));
        let held = share.map(Held::new);
        let own = match &held {
            Some(Held(share)) => share.held.load(Relaxed),
            None => in_flight.saturating_sub(self.foreign.load(Relaxed)),
        };
        let most = match (is_wanted, &held) {
            (Some(true), _) => limit.div_ceil(2),
            // No other client has sent a request yet.
            (None, None) => limit,
            (Some(false), _) | (None, Some(_)) => limit - limit / 8,
        };
        if in_flight > limit || own > most {
            return Err(NoPlace);
        }
        Ok(held)
    }

    /// Notes the client of a request. Returns true if the client has changed within [`WANTED`]; `None` if all
    /// requests so far came from one client.
    fn is_wanted(&self, client: u64) -> Option<bool> {
        let before = self.latest.load(Relaxed);
        if before != client {
            self.latest.store(client, Relaxed);
            if before != NOBODY {
                self.change.note(Instant::now());
            }
        }
        self.change.ago().map(|ago| ago <= WANTED)
    }
}

impl Default for Shares {
    fn default() -> Self {
        Self::new()
    }
}

// === impl Share ===

impl Share {
    /// Makes the share of a client. `client` identifies it: the name of its token, or its peer.
    pub fn of(client: impl Hash) -> Self {
        let mut hasher = DefaultHasher::new();
        client.hash(&mut hasher);
        Self {
            client: hasher.finish().max(LOCAL + 1),
            held: AtomicU64::new(0),
            foreign: Arc::default(),
        }
    }
}

// === impl Held ===

impl Held {
    fn new(share: Arc<Share>) -> Self {
        share.held.fetch_add(1, Relaxed);
        share.foreign.fetch_add(1, Relaxed);
        Self(share)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.held.fetch_sub(1, Relaxed);
        self.0.foreign.fetch_sub(1, Relaxed);
    }
}

// === impl Peer ===

impl Peer {
    /// Returns the peer at an address; `None` for a loopback address, which is this machine's.
    pub fn at(address: IpAddr) -> Option<Self> {
        let address = address.to_canonical();
        if address.is_loopback() {
            return None;
        }
        Some(Self::Address(match address {
            IpAddr::V4(_) => address,
            IpAddr::V6(address) => Ipv6Addr::from(u128::from(address) & NETWORK).into(),
        }))
    }

    /// Returns the peer for a user who connects by a Unix socket; `None` for our own user and root.
    pub fn user(number: u32) -> Option<Self> {
        let ours = [0, rustix::process::geteuid().as_raw()];
        (!ours.contains(&number)).then_some(Self::User(number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three clients that share a limit of 8 requests in flight; the first is this machine's own programs.
    struct World {
        shares: Shares,
        held: Vec<(usize, Option<Held>)>,
        clients: [Option<Arc<Share>>; 3],
    }

    impl World {
        fn new() -> Self {
            let shares = Shares::new();
            let peers = [1, 2].map(|user| Some(shares.of(Peer::User(user))));
            let [first, second] = peers;
            let clients = [None, first, second];
            let held = Vec::new();
            Self {
                shares,
                held,
                clients,
            }
        }

        fn ask(&mut self, client: usize, times: usize) -> usize {
            let mut found = 0;
            for _ in 0..times {
                let in_flight = self.held.len() as u64 + 1;
                let share = self.clients[client].clone();
                if let Ok(held) = self.shares.take(share, in_flight, 8) {
                    self.held.push((client, held));
                    found += 1;
                }
            }
            found
        }

        fn end(&mut self, client: usize, times: usize) {
            for _ in 0..times {
                let mut held = self.held.iter();
                let index = held.position(|(holder, _)| *holder == client).unwrap();
                self.held.remove(index);
            }
        }
    }

    #[test]
    fn a_client_leaves_some_for_others_and_half_while_they_want_it() {
        for [first, second] in [[1, 2], [1, 0]] {
            let mut world = World::new();
            assert_eq!(world.ask(first, 9), 7, "one is left");
            assert_eq!(world.ask(second, 9), 1);
            world.end(first, 4);
            assert_eq!(world.ask(first, 9), 1, "it has half");
            assert_eq!(world.ask(second, 9), 3);
            world.end(second, 4);
            assert_eq!(world.ask(first, 9), 0, "others asked a moment ago");
            world.shares.change.age(WANTED + Duration::from_secs(1));
            assert_eq!(world.ask(first, 9), 3);
        }
    }

    #[test]
    fn this_machine_alone_may_take_all() {
        let mut world = World::new();
        assert_eq!(world.ask(0, 9), 8);
        world.end(0, 8);
        assert_eq!(world.ask(1, 1), 1);
        // The other client sent the latest request, and may send more.
        assert_eq!(world.ask(0, 9), 4);
        world.shares.change.age(WANTED + Duration::from_secs(1));
        assert_eq!(world.ask(0, 9), 3, "one is left, and the other one has one");
    }

    #[test]
    fn a_client_that_comes_again_and_again_is_no_second_one() {
        let shares = Shares::new();
        for _ in 0..3 {
            let share = shares.of(Peer::User(1));
            assert!(shares.take(Some(share), 1, 8).is_ok());
        }
        assert_eq!(shares.change.ago(), None);
    }

    #[test]
    fn a_limit_of_one_is_for_whoever_comes() {
        let shares = Shares::new();
        for _ in 0..3 {
            for share in [None, Some(Arc::new(Share::of(1)))] {
                assert!(shares.take(share, 1, 1).is_ok());
            }
        }
    }

    #[test]
    fn peers_are_told_apart_by_where_they_come_from() {
        let peer = |address: &str| Peer::at(address.parse().unwrap());
        assert_eq!(peer("127.0.0.1"), None);
        assert_eq!(peer("::1"), None);
        assert_eq!(peer("::ffff:127.0.0.9"), None);
        assert_eq!(peer("::ffff:192.0.2.1"), peer("192.0.2.1"));
        assert_ne!(peer("192.0.2.1"), peer("192.0.2.2"));
        assert_eq!(peer("2001:db8::1"), peer("2001:db8::2"));
        assert_ne!(peer("2001:db8::1"), peer("2001:db8:0:1::1"));
        assert_eq!(Peer::user(0), None);
        let shares = Shares::new();
        let [first, again, other] = ["192.0.2.1", "192.0.2.1", "192.0.2.2"]
            .map(|address| shares.of(peer(address).unwrap()));
        assert!(Arc::ptr_eq(&first, &again) && !Arc::ptr_eq(&first, &other));
    }

    #[test]
    fn peers_that_have_nothing_in_flight_are_forgotten() {
        let shares = Shares::new();
        let kept = shares.of(Peer::User(0));
        for user in 1..3_000 {
            shares.of(Peer::User(user));
        }
        let peers = shares.peers.lock().unwrap().len();
        assert!(peers <= MANY_PEERS, "{peers}");
        assert!(Arc::ptr_eq(&kept, &shares.of(Peer::User(0))));
    }
}
