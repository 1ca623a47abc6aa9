//! Paths of the sandbox, from the URL to the response.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Query, Request, State};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{get, post};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::body::read;
use super::create_request::{self, CreateRequest};
use super::endpoints::{self, Endpoint, EndpointKind, Output};
use super::fault::Ending;
use super::files::{self, RESULTS};
use super::listing::{self, Listing};
use super::reply::{Refusal, Reply};
use super::task::{Status, Task};
use super::{Account, authorization, billing, presets};

type Answer = Result<Reply, Refusal>;
type Parameters = Query<HashMap<String, String>>;
type EndpointState = State<(Arc<Account>, &'static Endpoint)>;
type ListingState = State<(Arc<Account>, &'static Listing)>;

const PAGES: RangeInclusive<usize> = 1..=1000;
const PAGE_SIZE: usize = 30;

/// Builds the router. All paths except the results and `/` need a token.
pub(super) fn router(account: Arc<Account>) -> Router {
    let mut api = Router::new()
        .route("/account/costs", get(costs))
        .with_state(account.clone());
    for endpoint in endpoints::all() {
        let routes = match endpoint.kind {
            EndpointKind::Tasks => Router::new()
                .route(endpoint.path, get(list).post(create))
                .route(&format!("{}/{{id}}", endpoint.path), get(query)),
            EndpointKind::NewTasks | EndpointKind::Solutions | EndpointKind::Immediate => {
                Router::new().route(endpoint.path, post(create))
            }
            EndpointKind::Presets => Router::new().route(endpoint.path, get(list)),
            EndpointKind::Deletes(_) => Router::new().route(endpoint.path, post(delete)),
        };
        api = api.merge(routes.with_state((account.clone(), endpoint)));
    }
    for listing in [&listing::TASKS, &listing::SOLUTIONS] {
        let routes = get(tasks_by_ids).post(tasks_by_cursor);
        let routes = Router::new().route(listing.path, routes);
        api = api.merge(routes.with_state((account.clone(), listing)));
    }
    for listing in [&listing::PACKAGE, &listing::BALANCE] {
        let routes = Router::new().route(listing.path, post(ledger));
        api = api.merge(routes.with_state((account.clone(), listing)));
    }
    let results = get(result).with_state(account.clone());
    api.fallback(async || Refusal::documented(1203))
        .method_not_allowed_fallback(async || Refusal::documented(1202))
        .layer(middleware::from_fn_with_state(account, authorize))
        .route(&format!("{RESULTS}/{{name}}"), results)
        .route("/", get(()))
}

async fn authorize(
    State(account): State<Arc<Account>>,
    request: Request,
    next: Next,
) -> Result<Response, Refusal> {
    let now = account.now().as_secs();
    authorization::verify(request.uri().path(), request.headers(), now)?;
    Ok(next.run(request).await)
}

async fn create(
    State((account, endpoint)): EndpointState,
    Path(path): Path<HashMap<String, String>>,
    body: Body,
) -> Answer {
    let request = parse(endpoint, path.get("model"), body).await;
    let delay = match &request {
        Ok(request) => request.fault.delay,
        Err(_) => Duration::ZERO,
    };
    let answer = request.and_then(|request| place(&account, endpoint, request));
    sleep(account.latency.saturating_add(delay)).await;
    answer
}

async fn parse(
    endpoint: &Endpoint,
    model: Option<&String>,
    body: Body,
) -> Result<CreateRequest, Refusal> {
    if model.is_some_and(|model| !endpoint.models.contains(&model.as_str())) {
        return Err(Refusal::documented(1203));
    }
    let mut request = CreateRequest::parse(endpoint, &read(body).await?)?;
    if let Some(model) = model {
        let model = json!(model);
        request.echo.insert("model_name".to_owned(), model);
    }
    Ok(request)
}

/// Carries out a create request at once. Only the response may be delayed.
fn place(account: &Account, endpoint: &'static Endpoint, request: CreateRequest) -> Answer {
    let mut tasks = account.tasks();
    tasks.check_unused(request.external_id.as_deref())?;
    match &request.fault.ending {
        Ending::Refuse(refusal) => return Err(refusal.clone()),
        Ending::BrokenGateway => return Ok(Reply::BrokenGateway),
        // Guessed: an old element has no task that could fail.
        Ending::Fail if endpoint.output == Output::OldElement => {
            return Err(Refusal::documented(1301));
        }
        Ending::Succeed | Ending::Fail | Ending::Reset | Ending::Lost => {}
    }
    let now = Instant::now();
    let task = tasks.create(endpoint, request, account.now(), now)?;
    match task.request.fault.ending {
        Ending::Reset => return Ok(Reply::Reset),
        Ending::Lost => return Ok(Reply::BrokenGateway),
        _ => {}
    }
    // Even the shortest task begins as submitted.
    let status = if endpoint.has_tasks() {
        Status::Submitted
    } else {
        task.status(now)
    };
    Ok(Reply::Success(account.task_view(task, status).created()))
}

async fn query(State((account, endpoint)): EndpointState, Path(id): Path<String>) -> Answer {
    let tasks = account.tasks();
    let task = tasks.find(endpoint, &id)?;
    let status = task.status(Instant::now());
    Ok(Reply::Success(account.task_view(task, status).legacy()))
}

/// Returns one page of an endpoint's tasks, newest first.
async fn list(State((account, endpoint)): EndpointState, Query(parameters): Parameters) -> Answer {
    let page = number(&parameters, "pageNum", PAGES)?.unwrap_or(1);
    let size = number(&parameters, "pageSize", 1..=endpoint.largest_page)?.unwrap_or(PAGE_SIZE);
    let now = Instant::now();
    let task_view = |task: &Task| account.task_view(task, task.status(now)).legacy();
    let skip = (page - 1) * size;
    let page: Value = if endpoint.kind == EndpointKind::Presets {
        let presets = presets::of(endpoint, now);
        presets
            .iter()
            .skip(skip)
            .take(size)
            .map(task_view)
            .collect()
    } else {
        let tasks = account.tasks();
        let newest = tasks.of(endpoint).rev();
        newest.skip(skip).take(size).map(task_view).collect()
    };
    Ok(Reply::Success(page))
}

/// Deletes an output. Guessed: the response has an id of its own and the status of the deletion.
async fn delete(State((account, endpoint)): EndpointState, body: Body) -> Answer {
    let EndpointKind::Deletes(name) = endpoint.kind else {
        return Err(Refusal::documented(1203));
    };
    let body = create_request::object(&read(body).await?)?;
    let id = match &body[name] {
        Value::String(id) if !id.is_empty() => id.clone(),
        Value::Number(id) => id.to_string(),
        Value::Null | Value::String(_) => {
            return Err(Refusal::parameter(format!("{name} is missing or empty")));
        }
        value => return Err(create_request::invalid(name, value)),
    };
    let mut tasks = account.tasks();
    tasks.delete(endpoint.output, &id, Instant::now())?;
    let id = tasks.ids.number().to_string();
    Ok(Reply::Success(
        json!({ "task_id": id, "task_status": "succeed" }),
    ))
}

async fn tasks_by_ids(
    State((account, listing)): ListingState,
    Query(parameters): Parameters,
) -> Answer {
    let (tasks, now) = (account.tasks(), Instant::now());
    let found = listing.by_ids(&tasks, &parameters)?;
    let reports = found
        .iter()
        .map(|task| account.task_view(task, task.status(now)).standard());
    Ok(Reply::Success(reports.collect()))
}

async fn tasks_by_cursor(State((account, listing)): ListingState, body: Body) -> Answer {
    let body = create_request::object(&read(body).await?)?;
    let (tasks, now) = (account.tasks(), Instant::now());
    let page = listing.page(&tasks, &body, account.now(), now)?;
    let reports = page
        .tasks
        .iter()
        .map(|task| account.task_view(task, task.status(now)).standard());
    Ok(Reply::Success(json!({
        "result": reports.collect::<Value>(),
        "count": page.tasks.len(),
        "next_cursor": page.next_cursor,
        "has_more": page.has_more,
    })))
}

async fn ledger(State((account, listing)): ListingState, body: Body) -> Answer {
    let body = create_request::object(&read(body).await?)?;
    let tasks = account.tasks();
    let page = listing.page(&tasks, &body, account.now(), Instant::now())?;
    Ok(Reply::Success(billing::ledger(&page, &tasks.packs)))
}

async fn costs(State(account): State<Arc<Account>>, Query(parameters): Parameters) -> Answer {
    let packs = &account.tasks().packs;
    billing::costs(&parameters, packs, account.now()).map(Reply::Success)
}

async fn result(
    State(account): State<Arc<Account>>,
    Path(name): Path<String>,
    Query(parameters): Parameters,
) -> Result<Response, Refusal> {
    files::serve(&name, &parameters, account.now().as_secs())
}

/// Returns an optional number of the query, within its documented range.
fn number(
    parameters: &HashMap<String, String>,
    name: &str,
    range: RangeInclusive<usize>,
) -> Result<Option<usize>, Refusal> {
    let Some(text) = parameters.get(name) else {
        return Ok(None);
    };
    match text.parse() {
        Ok(number) if range.contains(&number) => Ok(Some(number)),
        _ => Err(create_request::invalid(name, &json!(text))),
    }
}
