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
    use std::future::pending;
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
    use std::time::UNIX_EPOCH;

    use axum::body::Body;
    use bytes::Bytes;
    use tokio::io::duplex;
    use tokio::net::{TcpListener, TcpStream};
    use tokio::sync::{Semaphore, mpsc};
    use tokio::task::{JoinSet, yield_now};

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

    /// An upstream that speaks HTTP/1.1, and HTTP/2 too if it has `streams`.
    struct Versatile {
        /// Most streams of an HTTP/2 connection; `None` without HTTP/2.
        streams: Option<u32>,
        refuses_http1: bool,
        /// Number of connections that were asked for.
        dials: AtomicU64,
        /// One permit for each connection that may open.
        gate: Semaphore,
        /// The ends of the connections on the side of upstream.
        servers: Mutex<JoinSet<()>>,
    }

    impl Versatile {
        fn open(&self, streams: Option<u32>) -> Transport {
            let (io, stream) = duplex(1_024);
            let server = async move {
                let mut http = h2::server::Builder::new();
                let Some(streams) = streams else {
                    // The stream of HTTP/1.1 stays open.
                    let _stream = stream;
                    return pending().await;
                };
                let http = http.max_concurrent_streams(streams);
                let mut http = http.handshake::<_, Bytes>(stream).await.unwrap();
                while let Some(Ok(_)) = http.accept().await {}
            };
            self.servers.lock().unwrap().spawn(server);
            Transport {
                io: Box::new(io),
                is_http2: streams.is_some(),
            }
        }
    }

    impl Dial for Versatile {
        fn dial(&self, versions: Versions) -> Dialing<'_> {
            Box::pin(async move {
                self.dials.fetch_add(1, Relaxed);
                self.gate.acquire().await.unwrap().forget();
                match versions {
                    Versions::Http1 if self.refuses_http1 => Err(NoHttp1("an alert".into()).into()),
                    Versions::Http1 => Ok(self.open(None)),
                    Versions::Any => Ok(self.open(self.streams)),
                }
            })
        }
    }

    /// Creates a pool, whose upstream opens `most` connections.
    fn versatile(
        streams: Option<u32>,
        refuses_http1: bool,
        most: usize,
    ) -> (Arc<Hand>, Arc<Versatile>, Arc<Pool>) {
        let clock = Arc::<Hand>::default();
        let upstream = Arc::new(Versatile {
            streams,
            refuses_http1,
            dials: AtomicU64::new(0),
            gate: Semaphore::new(most),
            servers: Mutex::default(),
        });
        let origin = "https://kling.test".parse().unwrap();
        let connector = Connector::new(Arc::<Versatile>::clone(&upstream), &origin);
        let patience = Duration::from_secs(20);
        let pool = Pool::new(connector, patience, Arc::<Hand>::clone(&clock));
        (clock, upstream, Arc::new(pool))
    }

    /// Lets the tasks of connections run. All is in memory, so a few turns are enough.
    async fn turns() {
        for _ in 0..100 {
            yield_now().await;
        }
    }

    /// Returns the major version of HTTP that a connection speaks, or 0 without a connection.
    fn version(connection: Option<&Connection>) -> u8 {
        match connection {
            None => 0,
            Some(Connection::Http1(_)) => 1,
            Some(Connection::Http2(_)) => 2,
        }
    }

    /// Keeps a connection of HTTP/1.1, of HTTP/2, or of both.
    async fn keep(pool: &Pool, classes: &[RequestClass]) {
        for class in classes {
            pool.checkin(pool.connect(*class).await.unwrap());
        }
        turns().await;
    }

    #[tokio::test]
    async fn each_class_gets_the_kept_connection_that_suits_it() {
        use RequestClass::{Few, Large, Many};
        // Few connects over HTTP/1.1 where upstream speaks it, Many over HTTP/2.
        for (refuses_http1, kept, of_thread, of_another) in [
            (false, &[][..], [0, 0, 0], [0, 0, 0]),
            (false, &[Few], [1, 1, 1], [1, 1, 1]),
            (false, &[Many], [2, 2, 0], [2, 2, 0]),
            (false, &[Few, Many], [1, 2, 1], [2, 2, 1]),
            // HTTP/1.1 is known to be refused, or not yet.
            (true, &[Few], [2, 2, 2], [2, 2, 2]),
            (true, &[Many], [2, 2, 0], [2, 2, 0]),
        ] {
            let case = format!("refuses HTTP/1.1: {refuses_http1}, kept for {kept:?}");
            for (index, class) in [Few, Many, Large].into_iter().enumerate() {
                let (_, _upstream, pool) = versatile(Some(100), refuses_http1, 9);
                keep(&pool, kept).await;
                let checkout = pool.checkout(class);
                assert_eq!(
                    version(checkout.as_ref()),
                    of_thread[index],
                    "{class:?}, {case}"
                );
                let (_, _upstream, pool) = versatile(Some(100), refuses_http1, 9);
                keep(&pool, kept).await;
                let checkout = pool.checkout_shared(class).await;
                assert_eq!(
                    version(checkout.as_ref()),
                    of_another[index],
                    "{class:?}, {case}"
                );
            }
        }
    }

    #[tokio::test]
    async fn connection_is_used_until_it_is_closed_or_a_minute_old() {
        type Event = fn(&Hand, &Versatile, &Pool);
        let events: [(&str, Event, bool); 5] = [
            ("at once", |_, _, _| (), true),
            ("59 s later", |clock, _, _| clock.0.store(59, Relaxed), true),
            (
                "60 s later",
                |clock, _, _| clock.0.store(60, Relaxed),
                false,
            ),
            (
                "closed by upstream",
                |_, upstream, _| upstream.servers.lock().unwrap().abort_all(),
                false,
            ),
            ("closed by the proxy", |_, _, pool| pool.clear(), false),
        ];
        for (when, event, is_used) in events {
            for (class, expected) in [(RequestClass::Few, 1), (RequestClass::Many, 2)] {
                let (clock, upstream, pool) = versatile(Some(100), false, 9);
                keep(&pool, &[class]).await;
                event(&clock, &upstream, &pool);
                turns().await;
                let checkout = pool.checkout(class);
                let expected = if is_used { expected } else { 0 };
                assert_eq!(version(checkout.as_ref()), expected, "{when}");
            }
        }
    }

    #[tokio::test]
    async fn idle_connection_is_closed_when_another_becomes_idle_a_minute_later() {
        let (clock, _upstream, pool) = versatile(None, false, 9);
        for (second, expected) in [
            (0, &[0][..]),
            (30, &[0, 30]),
            (59, &[0, 30, 59]),
            (60, &[30, 59, 60]),
            (120, &[120]),
        ] {
            clock.0.store(second, Relaxed);
            keep(&pool, &[RequestClass::Few]).await;
            let kept = pool.lock();
            let seconds = kept.idle.iter().map(|(_, since)| *since);
            let seconds = seconds.map(|since| since.duration_since(UNIX_EPOCH).unwrap().as_secs());
            assert_eq!(seconds.collect::<Vec<_>>(), expected, "second {second}");
        }
    }

    /// A connection of HTTP/2 serves many requests, so one is made at a time.
    #[tokio::test]
    async fn connections_are_made_at_once_only_if_each_serves_few_requests() {
        let few = u32::try_from(FEW).unwrap();
        for (streams, later) in [(None, 3), (Some(few), 3), (Some(few + 1), 1)] {
            let (_, upstream, pool) = versatile(streams, false, 0);
            // Before the first connection, it is not known what upstream speaks.
            for at_once in [1, later] {
                let mut connecting = JoinSet::new();
                for _ in 0..3 {
                    let pool = Arc::clone(&pool);
                    connecting.spawn(async move { pool.connect(RequestClass::Many).await });
                }
                turns().await;
                assert_eq!(
                    upstream.dials.swap(0, Relaxed),
                    at_once,
                    "{streams:?} streams"
                );
                upstream.gate.add_permits(3);
                for connected in connecting.join_all().await {
                    connected.unwrap();
                }
                upstream.gate.forget_permits(3);
                upstream.dials.store(0, Relaxed);
                pool.clear();
            }
        }
    }

    #[tokio::test]
    async fn thread_that_needs_the_warm_connection_again_makes_one_of_its_own() {
        for (seconds, dials) in [
            (&[0][..], 0),
            (&[0, 60], 0),
            (&[0, 60, 119], 1),
            // The connection is still being made.
            (&[0, 1, 2], 1),
        ] {
            let (clock, upstream, pool) = versatile(None, false, 0);
            for second in seconds {
                clock.0.store(*second, Relaxed);
                pool.note_miss(RequestClass::Few);
            }
            turns().await;
            assert_eq!(upstream.dials.load(Relaxed), dials, "misses at {seconds:?}");
            upstream.gate.add_permits(9);
            turns().await;
            let checkout = pool.checkout(RequestClass::Few);
            assert_eq!(u64::from(version(checkout.as_ref())), dials);
            pool.note_miss(RequestClass::Few);
            pool.note_miss(RequestClass::Few);
            turns().await;
            assert_eq!(upstream.dials.load(Relaxed), dials + 1, "and again");
        }
    }

    #[tokio::test]
    async fn requests_of_one_thread_count_together() {
        let (_, _, pool) = versatile(None, false, 0);
        let begin = |pool: &Pool| pool.in_flight().begin(&Body::empty());
        let in_flight: Vec<_> = (0..FEW).map(|_| begin(&pool)).collect();
        assert!(
            in_flight
                .iter()
                .all(|(class, _)| *class == RequestClass::Few)
        );
        assert_eq!(begin(&pool).0, RequestClass::Many);
        assert_eq!(begin(&pool.for_thread()).0, RequestClass::Few);
        drop(in_flight);
        assert_eq!(begin(&pool).0, RequestClass::Few);
    }
}
