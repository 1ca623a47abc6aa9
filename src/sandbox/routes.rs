//! The paths of the sandbox, from the URL to the answer.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, Path, Query, Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Extension, Router};
use serde_json::json;
use tokio::time::{Instant, sleep};

use super::order::{FAMILIES, Family, Order};
use super::reply::{self, Refusal};
use super::trigger::Ending;
use super::{Account, Reset, authorization};

type Answer = Result<Response, Refusal>;
type Parameters = Query<HashMap<String, String>>;
type FamilyState = State<(Arc<Account>, &'static Family)>;

/// Ten images in Base64 come to 133 MB.
const LARGEST_BODY: usize = 256 << 20;

/// Both results were drawn for this project with ffmpeg's `geq` filter.
const VIDEO: &[u8] = include_bytes!("result.mp4");
const IMAGE: &[u8] = include_bytes!("result.png");

/// Where results are, under the base of their URLs.
pub(super) const RESULTS: &str = "/results";

/// How far ahead the one resource pack expires.
const PACK_LIFE: Duration = Duration::from_hours(365 * 24);

const PAGES: RangeInclusive<usize> = 1..=1000;
const PAGE_SIZES: RangeInclusive<usize> = 1..=500;

/// Builds the router; all but the results and `/` asks for a token.
pub(super) fn router(account: Arc<Account>) -> Router {
    let mut api = Router::new()
        .route("/account/costs", get(costs))
        .with_state(account.clone());
    for family in FAMILIES {
        let routes = Router::new()
            .route(family.path, get(list).post(create))
            .route(&format!("{}/{{id}}", family.path), get(query))
            .with_state((account.clone(), family));
        api = api.merge(routes);
    }
    api.fallback(async || Refusal::documented(1203))
        .method_not_allowed_fallback(async || Refusal::documented(1202))
        .layer(middleware::from_fn_with_state(account, authorize))
        .layer(DefaultBodyLimit::max(LARGEST_BODY))
        .route(&format!("{RESULTS}/{{file}}"), get(result))
        .route("/", get(()))
}

async fn authorize(State(account): State<Arc<Account>>, request: Request, next: Next) -> Answer {
    let now = account.now().as_secs();
    authorization::verify(request.uri().path(), request.headers(), now)?;
    Ok(next.run(request).await)
}

async fn create(
    State((account, family)): FamilyState,
    body: Result<Bytes, BytesRejection>,
) -> Answer {
    let body = body.map_err(|rejection| Refusal::parameter(rejection.body_text()))?;
    let order = Order::parse(family, &body)?;
    drop(body);
    let delay = order.trigger.delay;
    let answer = place(&account, family, order);
    sleep(delay).await;
    answer
}

/// Carries out an order at once; only the answer may be delayed.
fn place(account: &Account, family: &'static Family, order: Order) -> Answer {
    let mut tasks = account.tasks();
    tasks.check_unused(order.external_id.as_deref())?;
    match &order.trigger.ending {
        Ending::Refuse(refusal) => return Err(refusal.clone()),
        Ending::BrokenGateway => return Ok(reply::broken_gateway()),
        Ending::Succeed | Ending::Fail | Ending::Reset => {}
    }
    let is_reset = order.trigger.ending == Ending::Reset;
    let task = tasks.create(family, order, account.now(), Instant::now())?;
    Ok(if is_reset {
        Extension(Reset).into_response()
    } else {
        reply::succeed(task)
    })
}

async fn query(State((account, family)): FamilyState, Path(id): Path<String>) -> Answer {
    let task = account.tasks().find(family, &id, Instant::now())?;
    Ok(reply::succeed(task))
}

async fn list(State((account, family)): FamilyState, Query(parameters): Parameters) -> Answer {
    let page = number(&parameters, "pageNum", PAGES)?.unwrap_or(1);
    let size = number(&parameters, "pageSize", PAGE_SIZES)?.unwrap_or(30);
    let skip = (page - 1) * size;
    let tasks = account.tasks().list(family, skip, size, Instant::now());
    Ok(reply::succeed(tasks))
}

/// Lists one resource pack that never ends, inside the second envelope of this path
/// (vendor's page "Account Usage", as quoted by `aself101/kling-api`, read 2026-11-22).
async fn costs(State(account): State<Arc<Account>>, Query(parameters): Parameters) -> Answer {
    let time = |name| {
        let missing = || Refusal::parameter(format!("{name} is required"));
        number(&parameters, name, 0..=u64::MAX)?.ok_or_else(missing)
    };
    let (start, end) = (time("start_time")?, time("end_time")?);
    if end < start {
        return Err(Refusal::parameter("end_time must not be before start_time"));
    }
    Ok(reply::succeed(json!({
        "code": 0,
        "msg": "success",
        "resource_pack_subscribe_infos": [{
            "resource_pack_name": "Sandbox",
            "resource_pack_id": "00000000000000000000000000000000",
            "resource_pack_type": "decreasing_total",
            "total_quantity": 1000.0,
            "remaining_quantity": 1000.0,
            "purchase_time": start,
            "effective_time": start,
            "invalid_time": (account.now() + PACK_LIFE).as_secs() * 1000,
            "status": "online",
        }],
    })))
}

async fn result(Path(file): Path<String>) -> Answer {
    let (content_type, bytes) = match file.rsplit_once('.') {
        Some((_, "mp4")) => ("video/mp4", VIDEO),
        Some((_, "png")) => ("image/png", IMAGE),
        _ => return Err(Refusal::documented(1203)),
    };
    Ok(([(CONTENT_TYPE, content_type)], bytes).into_response())
}

/// An optional number of the query, within what is documented.
fn number<T>(
    parameters: &HashMap<String, String>,
    name: &str,
    range: RangeInclusive<T>,
) -> Result<Option<T>, Refusal>
where
    T: FromStr + PartialOrd,
{
    let Some(text) = parameters.get(name) else {
        return Ok(None);
    };
    match text.parse() {
        Ok(number) if range.contains(&number) => Ok(Some(number)),
        _ => Err(Refusal::parameter(format!(
            "{name} value '{text}' is invalid"
        ))),
    }
}
