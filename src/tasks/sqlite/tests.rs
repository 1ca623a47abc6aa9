use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::UNIX_EPOCH;

use proptest::prelude::*;

use super::*;
use crate::tasks::record::{DEFAULT_ACCOUNT, TaskError, TaskResult};

const START: Timestamp = Timestamp(1_800_000_000_000);

fn store() -> Sqlite {
    Sqlite::in_memory("a".to_owned(), UNIX_EPOCH).unwrap()
}

fn record(reference: &str, state: TaskState) -> TaskRecord {
    TaskRecord {
        reference: TaskRef::stored(reference.to_owned()),
        change: 0,
        state,
        account: DEFAULT_ACCOUNT.to_owned(),
        client: "app".to_owned(),
        request_id: format!("request-{reference}"),
        upstream_request_id: None,
        task_id: None,
        external_id: None,
        family: Some("videos/text2video".to_owned()),
        path: "/v1/videos/text2video".to_owned(),
        order: Order::default(),
        pool: Some(Pool::Video),
        weight: 1,
        place: None,
        reserved: None,
        units: None,
        request_digest: None,
        key_digest: None,
        created_at: START,
        sent_at: None,
        ended_at: state.is_ended().then_some(START),
        error: None,
        results: Vec::new(),
    }
}

fn submitted(reference: &str, task_id: &str) -> TaskRecord {
    TaskRecord {
        task_id: Some(task_id.to_owned()),
        ..record(reference, TaskState::Submitted)
    }
}

fn seen(task_id: &str, state: TaskState) -> Observation {
    Observation {
        account: DEFAULT_ACCOUNT.to_owned(),
        task_id: task_id.to_owned(),
        external_id: None,
        of_create: None,
        state,
        message: None,
        units: None,
        results: Vec::new(),
        at: START,
    }
}

fn reports(records: impl IntoIterator<Item = TaskRecord>) -> Vec<Entry> {
    let boxed = records.into_iter().map(Box::new);
    boxed.map(Entry::Report).collect()
}

fn find(store: &mut Sqlite, id: &str) -> TaskRecord {
    store.find(id, None).unwrap().unwrap()
}

#[test]
fn record_is_read_as_it_was_written() {
    let mut store = store();
    let mut full = TaskRecord {
        upstream_request_id: Some("u".to_owned()),
        external_id: Some("mine".to_owned()),
        order: Order {
            model: Some("kling-v2-6".to_owned()),
            duration: Some("5".to_owned()),
            resolution: Some("1080p".to_owned()),
            mode: Some("pro".to_owned()),
            n: Some("2".to_owned()),
            audio: Some("on".to_owned()),
        },
        pool: Some(Pool::Image),
        weight: 9,
        place: Some(7),
        reserved: Some(Units(2_500_000)),
        units: Some(Units(2_400_000)),
        request_digest: Some(vec![1; 32]),
        key_digest: Some(vec![2; 32]),
        sent_at: Some(START),
        ended_at: Some(START),
        error: Some(TaskError::Failed {
            message: "\"no\"\n".to_owned(),
        }),
        results: vec![TaskResult {
            kind: "video".to_owned(),
            index: 0,
            url: "https://v1.klingai.com/a.mp4?Expires=1".to_owned(),
            expires_at: Some(START),
            watermarked: true,
        }],
        ..submitted("t_1", "8")
    };
    store.write(&reports([full.clone()]), START).unwrap();
    full.change = 1;
    for id in ["t_1", "8", "mine"] {
        assert_eq!(find(&mut store, id), full, "{id}");
    }
    assert_eq!(store.find("7", None).unwrap(), None);
    assert_eq!(store.find("8", Some("other")).unwrap(), None);
    assert_eq!(store.find("8", Some("app")).unwrap(), Some(full));
}

#[test]
fn news_of_a_task_fills_its_record() {
    let mut store = store();
    store
        .write(&reports([submitted("t_1", "8")]), START)
        .unwrap();
    let end = Observation {
        message: Some("risk control".to_owned()),
        units: Some(Units(0)),
        ..seen("8", TaskState::Failed)
    };
    let entries = [
        seen("8", TaskState::Processing),
        end,
        seen("8", TaskState::Succeeded),
    ];
    let entries = entries.map(|seen| Entry::Seen(Box::new(seen)));
    store.write(&entries, START).unwrap();
    let found = find(&mut store, "8");
    assert_eq!(found.state, TaskState::Failed);
    assert_eq!(found.units, Some(Units(0)));
    assert_eq!(found.ended_at, Some(START));
    let message = "risk control".to_owned();
    assert_eq!(found.error, Some(TaskError::Failed { message }));
    assert_eq!(found.change, 3);
}

#[test]
fn task_goes_to_the_create_that_was_looked_up() {
    let mut store = store();
    let lost = |reference| TaskRecord {
        external_id: Some("mine".to_owned()),
        ..record(reference, TaskState::Unknown)
    };
    let refused = record("t_3", TaskState::Rejected);
    let creates = [lost("t_1"), lost("t_2"), refused];
    store.write(&reports(creates), START).unwrap();
    let news = |task_id, create: &str| Observation {
        external_id: Some("mine".to_owned()),
        of_create: Some(TaskRef::stored(create.to_owned())),
        ..seen(task_id, TaskState::Processing)
    };
    let entries = [news("8", "t_1"), news("9", "t_3")];
    let entries = entries.map(|seen| Entry::Seen(Box::new(seen)));
    store.write(&entries, START).unwrap();
    let found = find(&mut store, "8");
    assert_eq!(found.reference.as_str(), "t_1");
    assert_eq!((found.state, found.ended_at), (TaskState::Processing, None));
    assert_eq!(find(&mut store, "t_2").state, TaskState::Unknown);
    // The refused create made no task, whatever an answer shows.
    assert_eq!(store.find("9", None).unwrap(), None);
}

#[test]
fn task_made_without_the_proxy_has_one_row() {
    let mut store = store();
    let lost = TaskRecord {
        external_id: Some("mine".to_owned()),
        ..record("t_1", TaskState::Unknown)
    };
    store.write(&reports([lost]), START).unwrap();
    let adopted = |reference, task_id, created_at| TaskRecord {
        external_id: Some("mine".to_owned()),
        created_at,
        ..submitted(reference, task_id)
    };
    let adopt = |store: &mut Sqlite, record| {
        store
            .write(&[Entry::Adopted(Box::new(record))], START)
            .unwrap();
    };
    // It is older than the create, so it is another one.
    adopt(&mut store, adopted("t_2", "7", START.before(SKEW * 2)));
    assert_eq!(find(&mut store, "7").reference.as_str(), "t_2");
    adopt(&mut store, adopted("t_3", "8", START));
    assert_eq!(find(&mut store, "8").reference.as_str(), "t_1");
    adopt(&mut store, adopted("t_4", "8", START));
    assert_eq!(store.find("t_4", None).unwrap(), None);
}

#[test]
fn unknown_creates_are_listed_newest_first() {
    let mut store = store();
    let unknown = |n| TaskRecord {
        ended_at: Some(Timestamp(START.0 + n)),
        ..record(&format!("t_{n}"), TaskState::Unknown)
    };
    store.write(&reports((0..5).map(unknown)), START).unwrap();
    store
        .write(&reports([submitted("t_9", "9")]), START)
        .unwrap();
    let found = store.unknown(Timestamp(START.0 + 2), 2).unwrap();
    let found = found.iter().map(|record| record.reference.as_str());
    assert_eq!(found.collect::<Vec<_>>(), ["t_4", "t_3"]);
    store.probe().unwrap();
    assert_eq!(store.newest_change().unwrap(), 6);
}

#[test]
fn lapsed_lease_ends_a_create_and_the_owner_has_the_last_word() {
    let mut store = store();
    let creates = [
        record("t_1", TaskState::Queued),
        record("t_2", TaskState::Sending),
    ];
    store.write(&reports(creates), START).unwrap();
    let half = START.after(LEASE / 2);
    store.keep_leases(half).unwrap();
    // Another process sees the creates of the first one, which has died.
    store.owner = "b".to_owned();
    store.keep_leases(half.after(LEASE)).unwrap();
    assert_eq!(find(&mut store, "t_2").state, TaskState::Sending);
    let late = half.after(LEASE).after(Duration::from_millis(1));
    store.keep_leases(late).unwrap();
    assert_eq!(find(&mut store, "t_1").state, TaskState::Canceled);
    let lost = find(&mut store, "t_2");
    assert_eq!(
        (lost.state, lost.ended_at),
        (TaskState::Unknown, Some(late))
    );
    // The first process was only asleep.
    store.owner = "a".to_owned();
    let outcomes = [submitted("t_1", "7"), submitted("t_2", "8")];
    store.write(&reports(outcomes), late).unwrap();
    assert_eq!(find(&mut store, "t_1").state, TaskState::Canceled);
    let found = find(&mut store, "t_2");
    assert_eq!((found.state, found.ended_at), (TaskState::Submitted, None));
}

#[test]
fn one_process_watches_an_account() {
    let mut store = store();
    assert!(store.watch("default", START).unwrap());
    store.owner = "b".to_owned();
    assert!(!store.watch("default", START.after(LEASE)).unwrap());
    assert!(store.watch("other", START).unwrap());
    let late = START.after(LEASE).after(Duration::from_millis(1));
    assert!(store.watch("default", late).unwrap());
    store.owner = "a".to_owned();
    assert!(!store.watch("default", late).unwrap());
}

#[test]
fn pages_of_a_list_hold_each_task_once() {
    let mut store = store();
    let tasks = (0..25).map(|n| TaskRecord {
        client: if n % 2 == 0 { "even" } else { "odd" }.to_owned(),
        created_at: Timestamp(START.0 + n),
        ..submitted(&format!("t_{n}"), &n.to_string())
    });
    store.write(&reports(tasks), START).unwrap();
    let mut query = ListQuery {
        client: Some("odd".to_owned()),
        since: Some(Timestamp(START.0 + 2)),
        until: Some(Timestamp(START.0 + 21)),
        limit: 4,
        ..ListQuery::default()
    };
    let mut ids = Vec::new();
    loop {
        let page = store.list(&query).unwrap();
        ids.extend(page.tasks.into_iter().filter_map(|task| task.task_id));
        // A task that is new belongs before the first page.
        let new = submitted(&format!("t_new_{}", ids.len()), "new");
        store.write(&reports([new]), START).unwrap();
        query.cursor = page.next;
        if page.next.is_none() {
            break;
        }
    }
    assert_eq!(
        ids,
        ["21", "19", "17", "15", "13", "11", "9", "7", "5", "3"]
    );
}

#[test]
fn ended_tasks_are_forgotten_and_running_ones_never() {
    let mut store = store();
    let tasks = [record("t_1", TaskState::Rejected), submitted("t_2", "8")];
    store.write(&reports(tasks), START).unwrap();
    assert!(!store.forget(START).unwrap());
    assert!(store.forget(Timestamp(START.0 + 1)).unwrap());
    assert!(!store.forget(Timestamp(i64::MAX)).unwrap());
    assert_eq!(store.find("t_1", None).unwrap(), None);
    find(&mut store, "t_2");
    // Memory keeps the newest ones only.
    store.most_ended = Some(2);
    let ended = |n| TaskRecord {
        ended_at: Some(Timestamp(START.0 + n)),
        ..record(&format!("t_ended_{n}"), TaskState::Succeeded)
    };
    store.write(&reports((0..5).map(ended)), START).unwrap();
    assert!(store.forget(START).unwrap());
    let left = store
        .list(&ListQuery {
            limit: 9,
            ..ListQuery::default()
        })
        .unwrap();
    let left = left.tasks.iter().map(|task| task.reference.as_str());
    assert_eq!(left.collect::<Vec<_>>(), ["t_ended_4", "t_ended_3", "t_2"]);
}

#[test]
fn entry_that_breaks_a_rule_does_not_keep_out_the_others() {
    let mut store = store();
    let same_key = |reference| TaskRecord {
        key_digest: Some(vec![1]),
        ..submitted(reference, reference)
    };
    let entries = reports([same_key("t_1"), same_key("t_2"), submitted("t_3", "8")]);
    store.write(&entries, START).unwrap();
    find(&mut store, "t_1");
    find(&mut store, "t_3");
    assert_eq!(store.find("t_2", None).unwrap(), None);
}

#[test]
fn file_of_another_kind_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tasks.db");
    let refusal = || {
        let opened = Sqlite::open(&file, "a".to_owned());
        opened
            .err()
            .map(|error| (error.is_about_the_file(), error.to_string()))
    };
    let (_, error) = refusal().unwrap();
    assert!(
        error.ends_with("cannot be opened: unable to open database file: ")
            || error.contains("unable to open"),
        "{error}"
    );

    fs::write(&file, "no database, but a text of more than sixteen bytes").unwrap();
    let (is_about_the_file, error) = refusal().unwrap();
    assert!(
        is_about_the_file && error.contains("is no SQLite file"),
        "{error}"
    );

    fs::write(&file, "").unwrap();
    let foreign = Connection::open(&file).unwrap();
    foreign.execute_batch("CREATE TABLE t (x)").unwrap();
    let (is_about_the_file, error) = refusal().unwrap();
    assert!(
        is_about_the_file && error.contains("not a task store"),
        "{error}"
    );

    fs::write(&file, "").unwrap();
    assert_eq!(refusal(), None);
    let newer = Connection::open(&file).unwrap();
    newer
        .pragma_update(None, "user_version", VERSION + 5)
        .unwrap();
    assert_eq!(
        refusal(),
        None,
        "a newer version that only adds is no reason to refuse"
    );
    newer
        .execute(
            "UPDATE meta SET value = ?1 WHERE name = 'oldest_writer'",
            [VERSION + 5],
        )
        .unwrap();
    let (is_about_the_file, error) = refusal().unwrap();
    assert!(
        is_about_the_file && error.contains("newer version of kling-proxy"),
        "{error}"
    );
}

#[test]
fn two_processes_share_a_file_and_one_that_reads_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tasks.db");
    fs::write(&file, "").unwrap();
    let mut first = Sqlite::open(&file, "a".to_owned()).unwrap();
    let mut second = Sqlite::open(&file, "b".to_owned()).unwrap();
    assert_eq!(second.newest_change().unwrap(), 0);
    first
        .write(&reports([submitted("t_1", "8")]), START)
        .unwrap();
    assert_eq!(second.newest_change().unwrap(), 1);
    let ended = Entry::Seen(Box::new(seen("8", TaskState::Succeeded)));
    second.write(&[ended], START).unwrap();
    let changes = first.changes_since(1, 9).unwrap();
    assert_eq!(changes.len(), 1);
    assert_eq!(changes[0].state, TaskState::Succeeded);
    let mut reader = Sqlite::read_only(&file).unwrap();
    assert_eq!(find(&mut reader, "8").state, TaskState::Succeeded);
    assert!(
        reader
            .write(&reports([submitted("t_2", "9")]), START)
            .is_err()
    );
}

#[test]
fn reader_sees_everything_and_makes_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let copies = tempfile::tempdir().unwrap();
    let file = folder.path().join("a?b #%41.db");
    fs::write(&file, "").unwrap();
    let names = |folder: &Path| {
        let entries = fs::read_dir(folder).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name());
        names.collect::<BTreeSet<_>>()
    };
    let read = |file: &Path| {
        let before = names(file.parent().unwrap());
        let found = find(&mut Sqlite::read_only(file).unwrap(), "8");
        assert_eq!(names(file.parent().unwrap()), before);
        found.state
    };
    let mut writer = Sqlite::open(&file, "a".to_owned()).unwrap();
    writer
        .write(&reports([submitted("t_1", "8")]), START)
        .unwrap();
    // Beside a process that writes.
    assert_eq!(read(&file), TaskState::Submitted);
    // A copy with the log, but without its index.
    let copy = copies.path().join("tasks.db");
    for ending in ["", "-wal"] {
        let name = |file: &Path| format!("{}{ending}", file.display());
        fs::copy(name(&file), name(&copy)).unwrap();
    }
    let error = Sqlite::read_only(&copy).err().unwrap().to_string();
    assert!(error.contains("without an index"), "{error}");
    assert_eq!(names(copies.path()).len(), 2);
    // After the end of all processes.
    drop(writer);
    assert_eq!(names(folder.path()).len(), 1);
    assert_eq!(read(&file), TaskState::Submitted);
}

/// A step of the model test. Numbers choose a create, and with it its task.
#[derive(Clone, Debug)]
enum Step {
    /// The owner reports a state. The owner is `a` for even creates and `b` for odd ones.
    Report(usize, TaskState),
    /// An answer from Kling shows the task.
    Seen(usize, TaskState),
    /// The same batch is written once more, since its confirmation was lost.
    Repeat,
    /// Time passes, in seconds, and one process keeps its leases.
    Leases(bool, u64),
}

const CREATES: usize = 6;

fn step() -> impl Strategy<Value = Step> {
    let state = prop::sample::select(TaskState::ALL.to_vec());
    let running = prop::sample::select(TaskState::ALL[2..6].to_vec());
    prop_oneof![
        4 => (0..CREATES, state).prop_map(|(create, state)| Step::Report(create, state)),
        4 => (0..CREATES, running).prop_map(|(create, state)| Step::Seen(create, state)),
        1 => Just(Step::Repeat),
        2 => (any::<bool>(), 1_u64..20).prop_map(|(is_a, seconds)| Step::Leases(is_a, seconds)),
    ]
}

/// A create as the model sees it, written without a look at the code above.
#[derive(Clone, Debug)]
struct Model {
    state: TaskState,
    has_task: bool,
    lease_until: u64,
}

impl Model {
    /// Is the news later in the life of the task?
    fn hear(&mut self, news: TaskState) {
        use TaskState::{
            Canceled, Failed, Processing, Rejected, Sending, Submitted, Succeeded, Unknown,
        };
        let rank = |state| match state {
            TaskState::Queued => 0,
            Sending => 1,
            Submitted => 2,
            Processing => 3,
            Succeeded | Failed | Rejected | Canceled | Unknown => 4,
        };
        let is_open = rank(self.state) < 2 || self.state == Unknown;
        let is_news = match self.state {
            Unknown => rank(news) >= 2 && news != Unknown,
            now => {
                rank(news) > rank(now)
                    && (is_open || matches!(news, Processing | Succeeded | Failed))
            }
        };
        if is_news {
            self.state = news;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn store_does_what_a_simple_model_does(steps in prop::collection::vec(step(), 1..40)) {
        let mut store = store();
        let mut model: BTreeMap<usize, Model> = BTreeMap::new();
        let mut batch = Vec::new();
        let mut seconds = 0;
        let mut changes = 0;
        for step in steps {
            let now = START.after(Duration::from_secs(seconds));
            let mut repeat = false;
            match &step {
                Step::Report(create, state) => {
                    store.owner = ["a", "b"][create % 2].to_owned();
                    let name = format!("t_{create}");
                    let task_id = state.is_running().then(|| create.to_string());
                    let report = TaskRecord { task_id, ..record(&name, *state) };
                    batch = reports([report]);
                    let has_task = state.is_running();
                    if let Some(model) = model.get_mut(create) {
                        let was_over = matches!(model.state, TaskState::Rejected | TaskState::Canceled);
                        model.hear(*state);
                        model.has_task |= has_task && !was_over;
                    } else {
                        let lease_until = seconds + LEASE.as_secs();
                        model.insert(*create, Model { state: *state, has_task, lease_until });
                    }
                }
                Step::Seen(create, state) => {
                    batch = vec![Entry::Seen(Box::new(seen(&create.to_string(), *state)))];
                    if let Some(model) = model.get_mut(create).filter(|model| model.has_task) {
                        model.hear(*state);
                    }
                }
                Step::Repeat => repeat = true,
                Step::Leases(is_a, pass) => {
                    batch.clear();
                    seconds += pass;
                    let now = START.after(Duration::from_secs(seconds));
                    store.owner = if *is_a { "a" } else { "b" }.to_owned();
                    store.keep_leases(now).unwrap();
                    for (create, model) in &mut model {
                        if matches!(model.state, TaskState::Queued | TaskState::Sending) {
                            if (create % 2 == 0) == *is_a {
                                model.lease_until = seconds + LEASE.as_secs();
                            } else if model.lease_until < seconds {
                                let is_queued = model.state == TaskState::Queued;
                                model.state = if is_queued { TaskState::Canceled } else { TaskState::Unknown };
                            }
                        }
                    }
                }
            }
            store.write(&batch, now).unwrap();
            let last = store.newest_change().unwrap();
            if repeat {
                prop_assert_eq!(last, changes, "a repeated write changes nothing");
            }
            // Each change has a number of its own, and the newest number of a task is its last.
            let news = store.changes_since(changes, 100).unwrap();
            prop_assert!(news.windows(2).all(|pair| pair[0].change < pair[1].change));
            changes = news.last().map_or(changes, |record| record.change);
            prop_assert_eq!(last, changes);
            for (create, model) in &model {
                let found = find(&mut store, &format!("t_{create}"));
                prop_assert_eq!(found.state, model.state, "create {} after {:?}", create, step);
                prop_assert_eq!(found.task_id.is_some(), model.has_task);
                prop_assert_eq!(found.ended_at.is_some(), model.state.is_ended());
            }
            let totals = store.totals(None).unwrap();
            prop_assert_eq!(totals.by_state.values().sum::<u64>(), model.len() as u64);
            let unsettled = store.unsettled(100).unwrap().len();
            let open = model.values().filter(|model| !model.state.is_ended() || model.state == TaskState::Unknown);
            prop_assert_eq!(unsettled, open.count());
        }
    }
}
