//! Connections that are kept for later requests.
//!
//! hyper-util's composable pools were considered first. Their types cannot be named, and they give an idle
//! connection to a waiting request without checking its idle time. This proxy needs that check.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use http::HeaderValue;
use tokio::time::timeout;

use super::connect::{Connected, Connection, Connector, Http1};
use super::http2;
use super::origin::Origin;
use super::request_class::{FEW, InFlightCount, RequestClass};
use crate::clock::Clock;
use crate::error::BoxError;

/// Longest idle time after which a connection is still used. Routers forget a silent connection without
/// notice, usually after minutes; a create sent into one would be lost until the timeout.
const LONGEST_IDLE: Duration = Duration::from_mins(1);
/// Idle time after which a connection that must stay ready is replaced.
const RENEWAL: Duration = Duration::from_secs(40);
/// Time after which a refusal of HTTP/1.1 is forgotten. One of upstream's servers may have been wrong, or
/// somebody on the network path may have forged it, because a TLS alert is not authenticated.
const REFUSAL: Duration = Duration::from_mins(10);
/// Longest wait for a connection of another thread to become ready, which takes one turn of the event loop of
/// that thread.
const TURN: Duration = Duration::from_millis(10);
/// Most idle connections that a thread keeps.
const MOST_IDLE: usize = 256;

/// The connections of one thread, whose lock is never contended; or the warm connection.
///
/// If upstream speaks both versions of HTTP, a few requests at a time go over HTTP/1.1. If there are more at
/// a time, those beyond the first few share a connection of HTTP/2. One request costs less over HTTP/1.1,
/// counting the work of the proxy and of upstream. Many at once cost less over HTTP/2, in handshakes and in
/// system calls. A request with a large body goes over HTTP/1.1, where the window of TCP limits it and not
/// the smaller window of a stream.
pub(super) struct Pool {
    connector: Connector,
    timeout: Duration,
    most_idle: usize,
    kept: Mutex<Kept>,
    in_flight: InFlightCount,
    /// Held while connecting, until it is known that upstream wants a connection for each request.
    turn: tokio::sync::Mutex<()>,
}

struct Kept {
    /// Read only with the lock held. Otherwise, times that another thread stores between the reading and the
    /// lock would lie in the future.
    clock: Arc<dyn Clock>,
    /// Idle connections of HTTP/1.1, sorted by time of last use. The last one is used next, so that
    /// surplus connections of a burst grow old.
    idle: Vec<(Http1, SystemTime)>,
    /// Connections of HTTP/2, which several requests share, with the time of their last use.
    shared: Vec<(http2::Sender, SystemTime)>,
    /// Scheme and authority, which each request over HTTP/2 needs.
    origin: Arc<Origin>,
    /// True if the last connection allows too few requests for others to wait for it.
    one_at_a_time: bool,
    /// Time at which upstream refused HTTP/1.1, if it did.
    http1_refused: Option<SystemTime>,
    /// Time at which this thread last had to use the warm connection.
    missed: Option<SystemTime>,
    /// True while a connection is being made for later requests.
    preparing: bool,
}

// === impl Pool ===

impl Pool {
    pub(super) fn new(connector: Connector, timeout: Duration, clock: Arc<dyn Clock>) -> Self {
        Self {
            timeout,
            most_idle: MOST_IDLE,
            kept: Mutex::new(Kept::new(clock, connector.origin())),
            connector,
            in_flight: InFlightCount::default(),
            turn: tokio::sync::Mutex::default(),
        }
    }

    /// Creates a pool to the same upstream, for one connection that stays ready.
    pub(super) fn warm(&self) -> Self {
        Self {
            most_idle: 1,
            ..Self::new(
                self.connector.clone().pinging(),
                self.timeout,
                Arc::clone(&self.lock().clock),
            )
        }
    }

    /// Creates a pool to the same upstream, for another thread.
    pub(super) fn for_thread(&self) -> Self {
        Self::new(
            self.connector.clone(),
            self.timeout,
            Arc::clone(&self.lock().clock),
        )
    }

    /// Returns the count of requests that this pool's thread has in flight.
    pub(super) fn in_flight(&self) -> &InFlightCount {
        &self.in_flight
    }

    /// Returns the `Host` value of upstream's origin.
    pub(super) fn host(&self) -> HeaderValue {
        self.connector.host()
    }

    /// Returns a kept connection that was open a moment ago, if there is one.
    pub(super) fn checkout(&self, class: RequestClass) -> Option<Connection> {
        let mut kept = self.lock();
        match class {
            RequestClass::Many => kept.shared(class).or_else(|| kept.idle()),
            RequestClass::Few | RequestClass::Large => kept.idle().or_else(|| kept.shared(class)),
        }
    }

    /// Does the same for another thread. An exchange whose end the other thread has seen may still occupy the
    /// connection here, so this waits up to [`TURN`] for each connection.
    pub(super) async fn checkout_shared(&self, class: RequestClass) -> Option<Connection> {
        if let Some(shared) = self.lock().shared(class) {
            return Some(shared);
        }
        loop {
            let mut connection = self.lock().youngest()?;
            if matches!(timeout(TURN, connection.sender.ready()).await, Ok(Ok(()))) {
                return Some(Connection::Http1(connection));
            }
        }
    }

    /// Makes a connection, or returns a stream of one that was made meanwhile.
    ///
    /// # Errors
    ///
    /// Name resolution, TCP or TLS failed, or took too long together.
    pub(super) async fn connect(&self, class: RequestClass) -> Result<Connection, BoxError> {
        let connecting = async {
            match self.connect_http1(class).await? {
                Some(connection) => Ok(Connection::Http1(connection)),
                None => self.connect_in_turn().await,
            }
        };
        match timeout(self.timeout, connecting).await {
            Ok(connected) => connected,
            Err(_) => Err(format!("no connection within {:?}", self.timeout).into()),
        }
    }

    /// Connects over HTTP/1.1 if that is better for this class and upstream speaks it; else returns `None`.
    async fn connect_http1(&self, class: RequestClass) -> Result<Option<Http1>, BoxError> {
        if class == RequestClass::Many || self.lock().is_http2_only() {
            return Ok(None);
        }
        let connected = self.connector.connect_http1().await?;
        let mut kept = self.lock();
        kept.http1_refused = connected.is_none().then(|| kept.clock.now());
        drop(kept);
        Ok(connected)
    }

    async fn connect_in_turn(&self) -> Result<Connection, BoxError> {
        let turn = if self.lock().one_at_a_time {
            None
        } else {
            Some(self.turn.lock().await)
        };
        // The request that had the turn before may have learned that all can connect at once.
        let turn = turn.filter(|_| !self.lock().one_at_a_time);
        // It may instead have made a connection that all can share.
        if let Some(shared) = self.lock().shared(RequestClass::Many) {
            return Ok(shared);
        }
        let connected = self.connector.connect().await?;
        let mut kept = self.lock();
        let connection = match connected {
            Connected::Http1(connection) => {
                kept.one_at_a_time = true;
                kept.http1_refused = None;
                Connection::Http1(connection)
            }
            Connected::Http2(connection) => {
                kept.one_at_a_time = connection.limit() <= FEW;
                let now = kept.clock.now();
                kept.shared.push((connection, now));
                let shared = kept.shared(RequestClass::Many);
                shared.ok_or("upstream allows no request on a new connection")?
            }
        };
        drop((kept, turn));
        Ok(connection)
    }

    /// Takes back a connection whose exchange is over.
    pub(super) fn checkin(&self, connection: Connection) {
        let Connection::Http1(connection) = connection else {
            return;
        };
        let mut kept = self.lock();
        let now = kept.clock.now();
        let aged = kept
            .idle
            .partition_point(|(_, since)| !is_young(*since, now));
        kept.idle.drain(..aged);
        if kept.idle.len() == self.most_idle {
            kept.idle.remove(0);
        }
        kept.idle.push((connection, now));
    }

    /// Makes sure that a connection is ready, and will be for some time. Returns false if the egress proxy
    /// refuses: then a further attempt is of no use before a request has reached upstream.
    pub(super) async fn renew(&self) -> bool {
        if self.connector.is_refused() {
            return false;
        }
        if self.lock().is_ready() {
            return true;
        }
        // A connection of HTTP/2 serves several threads.
        match self.connect(RequestClass::Many).await {
            Ok(connection) => {
                self.checkin(connection);
                tracing::debug!("connection kept ready");
            }
            Err(error) => tracing::debug!(%error, "no connection to keep ready"),
        }
        !self.connector.is_refused()
    }

    /// Closes all connections that no request uses.
    pub(super) fn clear(&self) {
        let mut kept = self.lock();
        kept.idle.clear();
        kept.shared.clear();
    }

    /// Records that this thread had to use the warm connection. The second time within [`LONGEST_IDLE`] it
    /// makes a connection of its own in the background, so that requests that follow one another need not go
    /// through another thread.
    pub(super) fn note_miss(self: &Arc<Self>, class: RequestClass) {
        let mut kept = self.lock();
        let now = kept.clock.now();
        let again = kept
            .missed
            .replace(now)
            .is_some_and(|since| is_young(since, now));
        if !again || kept.preparing {
            return;
        }
        kept.preparing = true;
        let pool = Arc::clone(self);
        tokio::spawn(async move {
            if let Ok(connection) = pool.connect(class).await {
                pool.checkin(connection);
            }
            pool.lock().preparing = false;
        });
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Kept ===

impl Kept {
    fn new(clock: Arc<dyn Clock>, origin: Arc<Origin>) -> Self {
        Self {
            clock,
            idle: Vec::new(),
            shared: Vec::new(),
            origin,
            one_at_a_time: false,
            http1_refused: None,
            missed: None,
            preparing: false,
        }
    }

    /// Returns true if upstream refused HTTP/1.1 less than [`REFUSAL`] ago.
    fn is_http2_only(&self) -> bool {
        let now = self.clock.now();
        self.http1_refused
            .is_some_and(|since| is_within(REFUSAL, since, now))
    }

    /// Reserves a free stream of an HTTP/2 connection, if there is one.
    fn shared(&mut self, class: RequestClass) -> Option<Connection> {
        if class == RequestClass::Large && !self.is_http2_only() {
            return None;
        }
        let now = self.clock.now();
        self.shared
            .retain(|(connection, since)| connection.is_usable() && is_young(*since, now));
        self.shared.iter_mut().find_map(|(connection, since)| {
            let stream = Connection::stream_of(connection, &self.origin)?;
            *since = now;
            Some(stream)
        })
    }

    fn idle(&mut self) -> Option<Connection> {
        // A connection that is not ready is closed, or has not written all of its last request.
        let mut youngest = std::iter::from_fn(|| self.youngest());
        let ready = youngest.find(|connection| connection.sender.is_ready())?;
        Some(Connection::Http1(ready))
    }

    /// Takes the connection that was used last, unless that was too long ago.
    fn youngest(&mut self) -> Option<Http1> {
        let now = self.clock.now();
        std::iter::from_fn(|| self.idle.pop())
            .find(|(_, since)| is_young(*since, now))
            .map(|(connection, _)| connection)
    }

    /// Returns true if a connection is ready and stays so until the next check.
    fn is_ready(&mut self) -> bool {
        let now = self.clock.now();
        // This renews the time of last use of a shared connection, and rightly: upstream has answered a
        // ping, or the connection would be closed.
        self.shared(RequestClass::Many).is_some()
            || self.idle.iter().any(|(connection, since)| {
                let age = now.duration_since(*since);
                connection.sender.is_ready() && age.is_ok_and(|age| age < RENEWAL)
            })
    }
}

fn is_young(since: SystemTime, now: SystemTime) -> bool {
    is_within(LONGEST_IDLE, since, now)
}

/// Returns true if `since` is less than `limit` ago, by the wall clock: other clocks stand still while a
/// laptop sleeps. Returns false if the wall clock went back.
fn is_within(limit: Duration, since: SystemTime, now: SystemTime) -> bool {
    now.duration_since(since).is_ok_and(|ago| ago < limit)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
    use std::time::UNIX_EPOCH;

    use tokio::io::duplex;
    use tokio::net::{TcpListener, TcpStream};
    use tokio::sync::mpsc;

    use super::*;
    use crate::upstream::dial::{Dial, Dialing, NoHttp1, Transport, Versions};
    use crate::upstream::{Network, client_config};

    /// A clock that shows this number of seconds since the epoch.
    #[derive(Default)]
    struct Hand(AtomicU64);

    impl Clock for Hand {
        fn now(&self) -> SystemTime {
            UNIX_EPOCH + Duration::from_secs(self.0.load(Relaxed))
        }
    }

    /// Creates a warm pool, and a receiver of the connections that its upstream accepts.
    async fn warm(clock: &Arc<Hand>) -> (Pool, mpsc::UnboundedReceiver<TcpStream>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let origin = format!("http://{}", listener.local_addr().unwrap());
        let (sender, accepted) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                sender.send(stream).unwrap();
            }
        });
        let patience = Duration::from_secs(20);
        let origin = origin.parse().unwrap();
        let network = Network::new(&origin, None, &client_config(None).unwrap(), patience);
        let connector = Connector::new(Arc::new(network), &origin);
        let clock: Arc<dyn Clock> = Arc::<Hand>::clone(clock);
        (Pool::new(connector, patience, clock).warm(), accepted)
    }

    #[tokio::test]
    async fn a_connection_that_stays_ready_is_replaced_before_it_is_too_old_to_use() {
        let clock = Arc::new(Hand::default());
        let (pool, _accepted) = warm(&clock).await;
        for (second, made) in [(0, 0), (11, 0), (39, 0), (40, 40), (79, 40), (91, 91)] {
            clock.0.store(second, Relaxed);
            pool.renew().await;
            while !pool.lock().is_ready() {
                tokio::task::yield_now().await;
            }
            let made = UNIX_EPOCH + Duration::from_secs(made);
            let kept: Vec<_> = pool.lock().idle.iter().map(|(_, since)| *since).collect();
            assert_eq!(kept, [made], "second {second}");
        }
    }

    #[tokio::test]
    async fn a_connection_that_upstream_closed_is_replaced() {
        let clock = Arc::new(Hand::default());
        let (pool, mut accepted) = warm(&clock).await;
        pool.renew().await;
        drop(accepted.recv().await);
        while pool.lock().is_ready() {
            tokio::task::yield_now().await;
        }
        pool.renew().await;
        assert!(accepted.recv().await.is_some());
        // A checkout would drop a connection that is not ready yet.
        while !pool.lock().is_ready() {
            tokio::task::yield_now().await;
        }
        assert!(pool.checkout(RequestClass::Few).is_some());
    }

    /// Refuses HTTP/1.1 if nothing else is offered, but chooses it if HTTP/2 is offered too. Counts the
    /// refusals.
    #[derive(Default)]
    struct Moody(AtomicU64);

    impl Dial for Moody {
        fn dial(&self, versions: Versions) -> Dialing<'_> {
            Box::pin(async move {
                if versions == Versions::Http1 {
                    self.0.fetch_add(1, Relaxed);
                    return Err(NoHttp1("an alert".into()).into());
                }
                Ok(Transport {
                    io: Box::new(duplex(1_024).0),
                    is_http2: false,
                })
            })
        }
    }

    fn moody() -> (Arc<Hand>, Arc<Moody>, Pool) {
        let (clock, upstream) = (Arc::<Hand>::default(), Arc::<Moody>::default());
        let origin = "https://kling.test".parse().unwrap();
        let connector = Connector::new(Arc::<Moody>::clone(&upstream), &origin);
        let pool = Pool::new(
            connector,
            Duration::from_secs(20),
            Arc::<Hand>::clone(&clock),
        );
        (clock, upstream, pool)
    }

    /// R39. A refusal may be forged, so it does not count for ever.
    #[tokio::test]
    async fn refusal_of_http_1_is_forgotten_after_ten_minutes() {
        let (clock, upstream, pool) = moody();
        clock.0.store(1_000, Relaxed);
        for (second, refusals, why) in [
            (1_000, 1, "not known yet"),
            (1_001, 1, "known"),
            (1_599, 1, "known"),
            (1_600, 2, "ten minutes later"),
            (1_601, 2, "known again"),
            (1_000, 3, "the clock went back"),
        ] {
            clock.0.store(second, Relaxed);
            assert!(
                pool.connect_http1(RequestClass::Few)
                    .await
                    .unwrap()
                    .is_none()
            );
            assert_eq!(upstream.0.load(Relaxed), refusals, "{second}: {why}");
        }
    }

    /// R39. A choice of HTTP/1.1 shows that an earlier refusal was wrong.
    #[tokio::test]
    async fn refusal_of_http_1_is_forgotten_when_upstream_chooses_it() {
        let (_, upstream, pool) = moody();
        for refusals in 1..=3 {
            let connected = pool.connect(RequestClass::Few).await.unwrap();
            assert!(matches!(connected, Connection::Http1(_)));
            assert_eq!(upstream.0.load(Relaxed), refusals);
        }
    }
}
