//! Captures the log lines of a run.

use std::cell::RefCell;
use std::fmt;
use std::sync::{Arc, Mutex};

use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::layer::{Context, Layer};

use crate::books::Books;

/// Writes each event about a request into the books. A run has one thread.
pub(crate) struct Capture;

#[derive(Default)]
struct Line {
    request_id: Option<String>,
    task: Option<String>,
    message: String,
}

thread_local! {
    static BOOKS: RefCell<Option<Arc<Mutex<Books>>>> = const { RefCell::new(None) };
}

/// Writes the log lines of this thread into these books from now on.
pub(crate) fn capture(books: Option<Arc<Mutex<Books>>>) {
    BOOKS.set(books);
}

impl<S: Subscriber> Layer<S> for Capture {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut line = Line::default();
        event.record(&mut line);
        BOOKS.with_borrow(|books| {
            let (Some(books), Some(request_id)) = (books, line.request_id) else {
                return;
            };
            let mut books = books.lock().unwrap();
            books.logged_tasks.extend(line.task);
            books.log.entry(request_id).or_default().push(line.message);
        });
    }
}

impl Visit for Line {
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "request_id" => self.request_id = Some(value.to_owned()),
            "task.id" => self.task = Some(value.to_owned()),
            "message" => value.clone_into(&mut self.message),
            _ => {}
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.message = format!("{value:?}");
        }
    }
}
