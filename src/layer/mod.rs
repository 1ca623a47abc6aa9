//! The layers, one per file. `stack.rs` sets their order.

pub mod authenticate;
pub mod cors;
pub mod detach;
pub mod drain;
pub mod guard;
pub mod local;
pub mod normalise;
pub mod observe;
pub mod recover;
pub mod retry;
pub mod trace;
pub mod wait;

use axum::response::Response;
use futures_util::future::{Either, Ready};

use crate::error::Error;

/// Future of a layer that either refuses a request at once or passes it to the inner service.
pub type Refusable<F> = Either<Ready<Result<Response, Error>>, F>;
