//! The task store in SQLite: a file, or the memory of this process.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::time::{Duration, SystemTime};

use percent_encoding::{NON_ALPHANUMERIC, percent_encode};
use rusqlite::types::Value;
use rusqlite::{
    Connection, ErrorCode, OpenFlags, Row, Transaction, TransactionBehavior, params,
    params_from_iter,
};

use super::record::{SKEW, TaskRecord, TaskRef, Timestamp};
use super::state::TaskState;
use super::store::{Cursor, Entry, LEASE, ListQuery, Observation, Page, Store, StoreError, Totals};
use super::units::Units;
use crate::kling::family::Pool;
use crate::kling::task::Order;
use crate::telemetry::printable;

/// A task store in SQLite.
pub struct Sqlite {
    connection: Connection,
    /// Name of this process among the owners of creates.
    owner: String,
    /// Most ended tasks that are kept; `None` for a file.
    most_ended: Option<i64>,
    /// Number before the first change.
    oldest_change: u64,
}

/// Marks a database file as a task store (`PRAGMA application_id`): `KlPx`.
const APPLICATION_ID: i64 = 0x4b6c_5078;
/// Steps from each version of the schema to the next. They only add, so that an older program can go on.
const MIGRATIONS: [&str; 1] = [include_str!("schema.sql")];
/// Version of the schema that this program makes: the number of [`MIGRATIONS`].
const VERSION: i64 = 1;
/// Longest wait for another process that writes to the same file.
const BUSY: Duration = Duration::from_millis(250);
/// Largest write-ahead log that stays on disk after a checkpoint, in bytes.
const MOST_LOG: i64 = 64 << 20;
/// Memory for pages of the file, in KiB.
const CACHE: i64 = 1024;
/// Prepared statements that are kept.
const STATEMENTS: usize = 32;
/// Most ended tasks that are kept in memory.
const MOST_ENDED: i64 = 10_000;
/// Most tasks that are deleted in one transaction.
const FORGET_AT_ONCE: i64 = 500;

/// Columns of a task, in the order of [`values`] and [`read`].
const COLUMNS: &str = "ref, change, state, account, client, request_id, upstream_request_id, task_id, \
     external_id, family, path, model, duration, resolution, mode, n, audio, pool, weight, place, reserved, \
     units, request_digest, key_digest, created_at, sent_at, ended_at, error, results";

// === impl Sqlite ===

impl Sqlite {
    /// Opens a store in the memory of this process. It keeps the newest 10,000 ended tasks. `now` is the time
    /// by the clock of this machine.
    ///
    /// # Errors
    ///
    /// SQLite has no memory.
    pub fn in_memory(owner: String, now: SystemTime) -> Result<Self, StoreError> {
        let connection = Connection::open_in_memory()?;
        let mut store = Self::with(connection, owner, "memory")?;
        // Numbers of changes go on from the last process, whose events a client may have seen.
        let first = Timestamp::from(now).0;
        let set = "UPDATE meta SET value = ?1 WHERE name = 'change'";
        store.connection.execute(set, [first])?;
        store.oldest_change = first.cast_unsigned();
        store.most_ended = Some(MOST_ENDED);
        Ok(store)
    }

    /// Opens a file, which must exist; an empty file becomes a new store. Other processes may use the same
    /// file at the same time.
    ///
    /// # Errors
    ///
    /// The file cannot be opened, is damaged, is too new, or belongs to another program.
    pub fn open(file: &Path, owner: String) -> Result<Self, StoreError> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
            | OpenFlags::SQLITE_OPEN_NO_MUTEX
            | OpenFlags::SQLITE_OPEN_NOFOLLOW;
        let place = file.display().to_string();
        let opened = Connection::open_with_flags(file, flags);
        let store = opened.map_err(StoreError::from).and_then(|connection| {
            connection.busy_timeout(BUSY)?;
            let log: String =
                connection
                    .pragma_update_and_check(None, "journal_mode", "wal", |row| row.get(0))?;
            if log != "wal" {
                tracing::warn!(
                    file = place,
                    "SQLite refuses a write-ahead log for this file"
                );
            }
            // A create that is recorded must survive a loss of power.
            connection.pragma_update(None, "synchronous", "full")?;
            connection.pragma_update(None, "journal_size_limit", MOST_LOG)?;
            Self::with(connection, owner, &place)
        });
        store.map_err(|error| name_file(error, &place))
    }

    /// Opens a file for reading. Nothing is created or changed.
    ///
    /// # Errors
    ///
    /// The file cannot be opened, is damaged, is too new, or belongs to another program.
    pub fn read_only(file: &Path) -> Result<Self, StoreError> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY
            | OpenFlags::SQLITE_OPEN_NO_MUTEX
            | OpenFlags::SQLITE_OPEN_URI;
        let place = file.display().to_string();
        let uri = read_only_uri(file).map_err(|error| StoreError::Closed {
            place: place.clone(),
            cause: error.to_string(),
        })?;
        let opened = Connection::open_with_flags(uri, flags).map_err(StoreError::from);
        let store = opened.and_then(|connection| {
            connection.busy_timeout(BUSY)?;
            let version = version(&connection, &place)?;
            if version == 0 {
                return Err(StoreError::NotOurs(place.clone()));
            }
            Ok(Self {
                connection,
                owner: String::new(),
                most_ended: None,
                oldest_change: 0,
            })
        });
        store.map_err(|error| name_file(error, &place))
    }

    fn with(mut connection: Connection, owner: String, place: &str) -> Result<Self, StoreError> {
        connection.set_prepared_statement_cache_capacity(STATEMENTS);
        connection.pragma_update(None, "cache_size", -CACHE)?;
        connection.pragma_update(None, "temp_store", "memory")?;
        migrate(&mut connection, place)?;
        Ok(Self {
            connection,
            owner,
            most_ended: None,
            oldest_change: 0,
        })
    }

    /// Begins a transaction that writes. It waits for other processes before it reads anything, so that it
    /// never has to be given up in the middle.
    fn begin(&mut self) -> Result<Transaction<'_>, StoreError> {
        let behavior = TransactionBehavior::Immediate;
        Ok(self.connection.transaction_with_behavior(behavior)?)
    }
}

impl Store for Sqlite {
    fn write(&mut self, entries: &[Entry], now: Timestamp) -> Result<(), StoreError> {
        let owner = self.owner.clone();
        let transaction = self.begin()?;
        for entry in entries {
            let written = match entry {
                Entry::Report(record) => report(&transaction, record, &owner, now),
                Entry::Seen(observation) => observe(&transaction, observation),
                Entry::Adopted(record) => adopt(&transaction, record, &owner, now),
            };
            match written {
                // One entry that breaks a rule of the schema must not keep out all others for ever.
                Err(rusqlite::Error::SqliteFailure(failure, cause))
                    if failure.code == ErrorCode::ConstraintViolation =>
                {
                    tracing::error!(
                        ?cause,
                        task = entry.reference(),
                        task.id = entry.task_id().map(printable).as_deref(),
                        "a task is not stored: it breaks a rule of the store"
                    );
                }
                written => written?,
            }
        }
        transaction.commit()?;
        Ok(())
    }

    fn probe(&mut self) -> Result<(), StoreError> {
        self.connection
            .prepare_cached("UPDATE meta SET value = value WHERE name = 'change'")?
            .execute([])?;
        Ok(())
    }

    fn keep_leases(&mut self, now: Timestamp) -> Result<(), StoreError> {
        let owner = self.owner.clone();
        let transaction = self.begin()?;
        transaction
            .prepare_cached(
                "UPDATE task SET lease_until = ?1 WHERE owner = ?2 AND state IN ('queued', 'sending')",
            )?
            .execute(params![now.after(LEASE).0, owner])?;
        let lapsed = select(
            &transaction,
            "state IN ('queued', 'sending') AND lease_until < ?1 ORDER BY seq",
            [Value::from(now.0)],
        )?;
        for (seq, mut record) in lapsed {
            record.state = match record.state {
                TaskState::Queued => TaskState::Canceled,
                _ => TaskState::Unknown,
            };
            record.ended_at = Some(now);
            update(&transaction, seq, &mut record)?;
        }
        transaction.commit()?;
        Ok(())
    }

    fn watch(&mut self, account: &str, now: Timestamp) -> Result<bool, StoreError> {
        let taken = self
            .connection
            .prepare_cached(
                "INSERT INTO watcher VALUES (?1, ?2, ?3) ON CONFLICT (account) DO UPDATE \
                 SET owner = ?2, lease_until = ?3 WHERE owner = ?2 OR lease_until < ?4",
            )?
            .execute(params![account, self.owner, now.after(LEASE).0, now.0])?;
        Ok(taken > 0)
    }

    fn forget(&mut self, ended_before: Timestamp) -> Result<bool, StoreError> {
        let mut deleted = self
            .connection
            .prepare_cached(
                "DELETE FROM task WHERE seq IN \
                 (SELECT seq FROM task WHERE ended_at < ?1 ORDER BY ended_at LIMIT ?2)",
            )?
            .execute(params![ended_before.0, FORGET_AT_ONCE])?;
        if let Some(most) = self.most_ended {
            deleted += self
                .connection
                .prepare_cached(
                    "DELETE FROM task WHERE seq IN (SELECT seq FROM task WHERE ended_at IS NOT NULL \
                     ORDER BY ended_at DESC LIMIT ?1 OFFSET ?2)",
                )?
                .execute(params![FORGET_AT_ONCE, most])?;
        }
        Ok(deleted > 0)
    }

    fn changes_since(&mut self, change: u64, limit: usize) -> Result<Vec<TaskRecord>, StoreError> {
        let change = change.cast_signed();
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let changed = select(
            &self.connection,
            "change > ?1 ORDER BY change LIMIT ?2",
            [Value::from(change), Value::from(limit)],
        )?;
        Ok(changed.into_iter().map(|(_, record)| record).collect())
    }

    fn oldest_change(&self) -> u64 {
        self.oldest_change
    }

    fn newest_change(&mut self) -> Result<u64, StoreError> {
        let newest: i64 = self
            .connection
            .prepare_cached("SELECT value FROM meta WHERE name = 'change'")?
            .query_row([], |row| row.get(0))?;
        Ok(newest.cast_unsigned())
    }

    fn find(&mut self, id: &str, client: Option<&str>) -> Result<Option<TaskRecord>, StoreError> {
        for column in ["ref", "task_id", "external_id"] {
            // A plus keeps SQLite from reading all tasks of the client instead.
            let choice = match client {
                Some(_) => format!("{column} = ?1 AND +client = ?2 ORDER BY seq DESC LIMIT 1"),
                None => format!("{column} = ?1 ORDER BY seq DESC LIMIT 1"),
            };
            let values = [id]
                .into_iter()
                .chain(client)
                .map(|text| Value::from(text.to_owned()));
            if let Some((_, record)) = select(&self.connection, &choice, values)?.pop() {
                return Ok(Some(record));
            }
        }
        Ok(None)
    }

    fn list(&mut self, query: &ListQuery) -> Result<Page, StoreError> {
        let text = |text: &Option<String>| text.clone().map(Value::from);
        let time = |time: Option<Timestamp>| time.map(|time| Value::from(time.0));
        let state = query
            .state
            .map(|state| Value::from(state.as_str().to_owned()));
        let filters = [
            ("state = ?", state),
            ("model = ?", text(&query.model)),
            ("client = ?", text(&query.client)),
            ("account = ?", text(&query.account)),
            ("request_id = ?", text(&query.request_id)),
            ("key_digest = ?", query.key_digest.clone().map(Value::from)),
            // A plus keeps SQLite from sorting all tasks of this time: the list has the order of `seq`.
            ("+created_at >= ?", time(query.since)),
            // Instead of reading all newer tasks, the list begins at the newest one of this time.
            (
                "seq <= (SELECT seq FROM task WHERE created_at <= ? ORDER BY created_at DESC LIMIT 1)",
                time(query.until),
            ),
            ("seq < ?", query.cursor.map(|cursor| Value::from(cursor.0))),
        ];
        let mut choice = String::from("true");
        let mut values = Vec::new();
        for (condition, value) in filters {
            if let Some(value) = value {
                choice.push_str(" AND ");
                choice.push_str(condition);
                values.push(value);
            }
        }
        // One more than the page has shows if there is a next page.
        let limit = i64::try_from(query.limit)
            .unwrap_or(i64::MAX)
            .saturating_add(1);
        choice.push_str(" ORDER BY seq DESC LIMIT ?");
        values.push(Value::from(limit));
        let mut rows = select(&self.connection, &choice, values)?;
        let has_more = rows.len() > query.limit;
        rows.truncate(query.limit);
        let last = rows
            .last()
            .filter(|_| has_more)
            .map(|(seq, _)| Cursor(*seq));
        Ok(Page {
            tasks: rows.into_iter().map(|(_, record)| record).collect(),
            next: last,
        })
    }

    fn unknown(&mut self, since: Timestamp, limit: usize) -> Result<Vec<TaskRecord>, StoreError> {
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let found = select(
            &self.connection,
            "state = 'unknown' AND ended_at >= ?1 ORDER BY seq DESC LIMIT ?2",
            [Value::from(since.0), Value::from(limit)],
        )?;
        Ok(found.into_iter().map(|(_, record)| record).collect())
    }

    fn unsettled(&mut self, limit: usize) -> Result<Vec<TaskRecord>, StoreError> {
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let found = select(
            &self.connection,
            "state IN ('queued', 'sending', 'submitted', 'processing', 'unknown') ORDER BY seq LIMIT ?1",
            [Value::from(limit)],
        )?;
        Ok(found.into_iter().map(|(_, record)| record).collect())
    }

    fn totals(&mut self, client: Option<&str>) -> Result<Totals, StoreError> {
        let mut statement = self.connection.prepare_cached(
            "SELECT state, count(*), coalesce(sum(units), 0) FROM task \
             WHERE ?1 IS NULL OR client = ?1 GROUP BY state",
        )?;
        let mut rows = statement.query([client])?;
        let mut totals = Totals::default();
        while let Some(row) = rows.next()? {
            let (count, units): (i64, i64) = (row.get(1)?, row.get(2)?);
            totals
                .by_state
                .insert(state(row, 0)?, count.cast_unsigned());
            totals.units.0 += units;
        }
        Ok(totals)
    }

    fn is_shared(&self) -> bool {
        self.most_ended.is_none()
    }
}

/// Returns the name under which SQLite opens a file for reading, and makes no file beside it.
///
/// SQLite makes a missing write-ahead log and its index also for a connection that only reads, and leaves
/// them there. A log is missing while no process has the file open: the file then has everything, and
/// `immutable` reads it without a log.
///
/// # Errors
///
/// The file cannot be read, or has a log without an index, as a copy may have.
fn read_only_uri(file: &Path) -> io::Result<String> {
    // The log is beside the file that a link leads to.
    let file = file.canonicalize()?;
    let is_beside = |ending: &str| {
        let mut name = file.clone().into_os_string();
        name.push(ending);
        Path::new(&name).exists()
    };
    let way = match (is_beside("-wal"), is_beside("-shm")) {
        (false, _) if wants_log(&file)? => "&immutable=1",
        (true, false) => return Err(io::Error::other(NO_INDEX)),
        _ => "",
    };
    let path = percent_encode(file.as_os_str().as_bytes(), NON_ALPHANUMERIC);
    Ok(format!("file:{path}?mode=ro{way}"))
}

const NO_INDEX: &str =
    "beside it is a write-ahead log without an index (-shm), which a proxy makes at its start";

/// Returns true if a database file is used with a write-ahead log: byte 18 of its header is 2 (SQLite,
/// "Database File Format", section 1.3.3).
fn wants_log(file: &Path) -> io::Result<bool> {
    let mut header = Vec::new();
    File::open(file)?.take(19).read_to_end(&mut header)?;
    Ok(header.get(18) == Some(&2))
}

/// Adds the file to an error that is about it.
fn name_file(error: StoreError, place: &str) -> StoreError {
    let StoreError::Failed(failure) = error else {
        return error;
    };
    match failure.sqlite_error_code() {
        Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => {
            StoreError::Broken(place.to_owned())
        }
        _ => StoreError::Closed {
            place: place.to_owned(),
            cause: failure.to_string(),
        },
    }
}

/// Returns the version of the schema; 0 for an empty file.
fn version(connection: &Connection, place: &str) -> Result<i64, StoreError> {
    let number = |name| connection.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
    let (application, version) = (number("application_id")?, number("user_version")?);
    if application == APPLICATION_ID {
        if version > VERSION {
            let oldest = connection.query_row(
                "SELECT value FROM meta WHERE name = 'oldest_writer'",
                [],
                |row| row.get::<_, i64>(0),
            )?;
            if oldest > VERSION {
                return Err(StoreError::TooNew {
                    place: place.to_owned(),
                    found: version,
                    known: VERSION,
                });
            }
        }
        return Ok(version);
    }
    let tables: i64 =
        connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
    if application != 0 || version != 0 || tables != 0 {
        return Err(StoreError::NotOurs(place.to_owned()));
    }
    Ok(0)
}

/// Brings the schema to the version of this program, or makes it.
fn migrate(connection: &mut Connection, place: &str) -> Result<(), StoreError> {
    if version(connection, place)? >= VERSION {
        return Ok(());
    }
    // Another process may do the same at this moment, so the version is read again behind the lock.
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Exclusive)?;
    let version = version(&transaction, place)?;
    let done = usize::try_from(version).unwrap_or(0);
    for step in MIGRATIONS.iter().skip(done) {
        transaction.execute_batch(step)?;
    }
    transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
    transaction.pragma_update(None, "user_version", VERSION.max(version))?;
    transaction.commit()?;
    Ok(())
}

/// Writes what the owner of a create knows of it.
fn report(
    transaction: &Transaction<'_>,
    report: &TaskRecord,
    owner: &str,
    now: Timestamp,
) -> rusqlite::Result<()> {
    let reference = Value::from(report.reference.as_str().to_owned());
    let stored = select(transaction, "ref = ?1", [reference])?.pop();
    if let Some((seq, mut record)) = stored {
        if record.merge(report) {
            update(transaction, seq, &mut record)?;
        }
        return Ok(());
    }
    let mut record = report.clone();
    record.change = next_change(transaction)?;
    let lease = [
        Value::from(owner.to_owned()),
        Value::from(now.after(LEASE).0),
    ];
    transaction
        .prepare_cached(&format!(
            "INSERT INTO task ({COLUMNS}, owner, lease_until) VALUES ({}, ?, ?)",
            marks()
        ))?
        .execute(params_from_iter(values(&record).into_iter().chain(lease)))?;
    Ok(())
}

/// Writes what one of Kling's answers says of a task. Tasks that the proxy did not make are left out.
fn observe(transaction: &Transaction<'_>, seen: &Observation) -> rusqlite::Result<()> {
    let text = |text: &String| Value::from(text.clone());
    let by_id = "task_id = ?1 AND account = ?2 ORDER BY seq DESC LIMIT 1";
    let values = [text(&seen.task_id), text(&seen.account)];
    let mut stored = select(transaction, by_id, values)?.pop();
    if let (None, Some(create)) = (&stored, &seen.of_create) {
        // The answer to its create was lost.
        let lost = "ref = ?1 AND task_id IS NULL";
        let values = [Value::from(create.as_str().to_owned())];
        stored = select(transaction, lost, values)?.pop();
    }
    if let Some((seq, mut record)) = stored
        && record.observe(seen)
    {
        update(transaction, seq, &mut record)?;
    }
    Ok(())
}

/// Writes a task that was made without this proxy, unless one of its creates turns out to be it.
fn adopt(
    transaction: &Transaction<'_>,
    found: &TaskRecord,
    owner: &str,
    now: Timestamp,
) -> rusqlite::Result<()> {
    let maybe = |text: &Option<String>| Value::from(text.clone());
    let account = Value::from(found.account.clone());
    let known = "task_id = ?1 AND account = ?2 ORDER BY seq DESC LIMIT 1";
    let values = [maybe(&found.task_id), account.clone()];
    let mut stored = select(transaction, known, values)?.pop();
    if stored.is_none() {
        // A task that is older than the create is not the one that it has made.
        let earliest = found.created_at.after(SKEW).0;
        let lost = "external_id = ?1 AND account = ?2 AND task_id IS NULL AND state = 'unknown' \
                    AND created_at <= ?3 ORDER BY seq DESC LIMIT 1";
        let values = [maybe(&found.external_id), account, Value::from(earliest)];
        stored = select(transaction, lost, values)?.pop();
    }
    match stored {
        None => report(transaction, found, owner, now),
        Some((seq, mut record)) => {
            if record.merge(found) {
                update(transaction, seq, &mut record)?;
            }
            Ok(())
        }
    }
}

/// Writes a task that has changed, under the next number of a change.
fn update(
    transaction: &Transaction<'_>,
    seq: i64,
    record: &mut TaskRecord,
) -> rusqlite::Result<()> {
    record.change = next_change(transaction)?;
    let values = values(record).into_iter().chain([Value::from(seq)]);
    transaction
        .prepare_cached(&format!(
            "UPDATE task SET ({COLUMNS}) = ({}) WHERE seq = ?",
            marks()
        ))?
        .execute(params_from_iter(values))?;
    Ok(())
}

fn next_change(transaction: &Transaction<'_>) -> rusqlite::Result<u64> {
    let next: i64 = transaction
        .prepare_cached("UPDATE meta SET value = value + 1 WHERE name = 'change' RETURNING value")?
        .query_row([], |row| row.get(0))?;
    Ok(next.cast_unsigned())
}

/// Returns a question mark for each of [`COLUMNS`].
fn marks() -> String {
    vec!["?"; COLUMNS.split(',').count()].join(", ")
}

/// Returns the values of [`COLUMNS`].
fn values(record: &TaskRecord) -> Vec<Value> {
    let text = |text: &str| Value::from(text.to_owned());
    let maybe = |text: &Option<String>| Value::from(text.clone());
    let time = |time: Option<Timestamp>| Value::from(time.map(|time| time.0));
    let units = |units: Option<Units>| Value::from(units.map(|units| units.0));
    let Order {
        model,
        duration,
        resolution,
        mode,
        n,
        audio,
    } = &record.order;
    // Plain structs of texts and numbers have a JSON text.
    let error = record
        .error
        .as_ref()
        .and_then(|error| serde_json::to_string(error).ok());
    let results = (!record.results.is_empty()).then(|| serde_json::to_string(&record.results).ok());
    vec![
        text(record.reference.as_str()),
        Value::from(record.change.cast_signed()),
        text(record.state.as_str()),
        text(&record.account),
        text(&record.client),
        text(&record.request_id),
        maybe(&record.upstream_request_id),
        maybe(&record.task_id),
        maybe(&record.external_id),
        maybe(&record.family),
        text(&record.path),
        maybe(model),
        maybe(duration),
        maybe(resolution),
        maybe(mode),
        maybe(n),
        maybe(audio),
        Value::from(record.pool.map(|pool| pool.as_str().to_owned())),
        Value::from(record.weight),
        Value::from(record.place.map(u64::cast_signed)),
        units(record.reserved),
        units(record.units),
        Value::from(record.request_digest.clone()),
        Value::from(record.key_digest.clone()),
        Value::from(record.created_at.0),
        time(record.sent_at),
        time(record.ended_at),
        Value::from(error),
        Value::from(results.flatten()),
    ]
}

/// Returns the tasks of a choice, each with its place in the list of all tasks.
fn select(
    connection: &Connection,
    choice: &str,
    values: impl IntoIterator<Item = Value>,
) -> rusqlite::Result<Vec<(i64, TaskRecord)>> {
    connection
        .prepare_cached(&format!("SELECT {COLUMNS}, seq FROM task WHERE {choice}"))?
        .query_map(params_from_iter(values), |row| {
            Ok((row.get("seq")?, read(row)?))
        })?
        .collect()
}

/// Reads a row of [`COLUMNS`].
fn read(row: &Row<'_>) -> rusqlite::Result<TaskRecord> {
    let time = |name| Ok::<_, rusqlite::Error>(row.get::<_, Option<i64>>(name)?.map(Timestamp));
    let units = |name| Ok::<_, rusqlite::Error>(row.get::<_, Option<i64>>(name)?.map(Units));
    let json = |name| row.get::<_, Option<String>>(name);
    let pool: Option<String> = row.get("pool")?;
    let place: Option<i64> = row.get("place")?;
    let change: i64 = row.get("change")?;
    Ok(TaskRecord {
        reference: TaskRef::stored(row.get("ref")?),
        change: change.cast_unsigned(),
        state: state(row, 2)?,
        account: row.get("account")?,
        client: row.get("client")?,
        request_id: row.get("request_id")?,
        upstream_request_id: row.get("upstream_request_id")?,
        task_id: row.get("task_id")?,
        external_id: row.get("external_id")?,
        family: row.get("family")?,
        path: row.get("path")?,
        order: Order {
            model: row.get("model")?,
            duration: row.get("duration")?,
            resolution: row.get("resolution")?,
            mode: row.get("mode")?,
            n: row.get("n")?,
            audio: row.get("audio")?,
        },
        pool: pool.as_deref().and_then(Pool::named),
        weight: row.get("weight")?,
        place: place.map(i64::cast_unsigned),
        reserved: units("reserved")?,
        units: units("units")?,
        request_digest: row.get("request_digest")?,
        key_digest: row.get("key_digest")?,
        created_at: Timestamp(row.get("created_at")?),
        sent_at: time("sent_at")?,
        ended_at: time("ended_at")?,
        // A newer version of the program may have written a form that this one does not know.
        error: json("error")?.and_then(|json| serde_json::from_str(&json).ok()),
        results: json("results")?
            .and_then(|json| serde_json::from_str(&json).ok())
            .unwrap_or_default(),
    })
}

/// Reads the word of a state.
fn state(row: &Row<'_>, column: usize) -> rusqlite::Result<TaskState> {
    let word: String = row.get(column)?;
    // A newer version of the program may have further states. Of those, nothing is known here.
    Ok(TaskState::from_word(&word).unwrap_or(TaskState::Unknown))
}

#[cfg(test)]
mod tests;
