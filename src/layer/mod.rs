//! The layers, one a file; `stack.rs` puts them in their order.

pub mod authenticate;
pub mod cors;
pub mod detach;
pub mod drain;
pub mod guard;
pub mod normalise;
pub mod retry;
pub mod trace;

use axum::response::Response;
use futures_util::future::{Either, Ready};

use crate::error::Error;

/// The future of a layer that either refuses at once or does what the inner service does.
pub type Refusable<F> = Either<Ready<Result<Response, Error>>, F>;
