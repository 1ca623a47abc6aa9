//! Facts about Kling's API. Nothing here does I/O.

pub mod api_path;
pub mod envelope;
pub mod family;
pub mod idempotency;
pub mod service_code;
pub mod task;
pub mod task_answer;
