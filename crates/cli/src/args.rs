//! The command line.

use std::io::{self, BufRead as _};
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use protocol::batches::BatchId;
use protocol::jobs::JobStatus;
use protocol::keep_alive::KeepAlive;
use protocol::policy::ServiceClass;
use protocol::{AdapterName, ModelName, Region, TenantId};

/// Dependable AI inference over scattered machines, behind one OpenAI-compatible address.
#[derive(Debug, Parser)]
#[command(name = "tether", version, arg_required_else_help = true, propagate_version = true, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    pub common: Common,
    #[command(subcommand)]
    pub command: Command,
}

/// Options of all commands.
#[derive(Debug, Clone, Default, Args)]
pub struct Common {
    /// Settings file [default: tether.toml in the configuration folder]
    #[arg(long, global = true, value_name = "FILE", env = "TETHER_CONFIG")]
    pub config: Option<PathBuf>,
    /// Folder for keys, databases and models
    #[arg(long, global = true, value_name = "FOLDER")]
    pub data_dir: Option<PathBuf>,
    /// Log format
    #[arg(long, global = true, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
    /// Print JSON (commands that show something)
    #[arg(long, global = true)]
    pub json: bool,
}

/// Log format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    Pretty,
    /// One JSON object per line.
    Json,
}

impl LogFormat {
    /// Returns the word in the settings file.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pretty => "pretty",
            Self::Json => "json",
        }
    }
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the whole network in one process
    #[command(visible_alias = "serve")]
    Up(UpArgs),
    /// Run a bootstrap node, which helps nodes find each other
    Bootstrap(NodeArgs),
    /// Run a registry, which keeps models, API keys and the members of the network
    Registry(NodeArgs),
    /// Run an orchestrator, which places jobs on workers
    Orchestrator(OrchestratorArgs),
    /// Run a gateway, which serves the OpenAI-compatible API
    Gateway(GatewayArgs),
    /// Run a worker, which loads models and runs jobs
    Worker(WorkerArgs),
    /// Restart every service of this data folder with the flags it had
    Start(StartArgs),
    /// Create an invite, with which another machine joins the network
    Invite(InviteArgs),
    /// Join a network with an invite and start the invited service
    Join(JoinArgs),
    /// Remove a node from the network within 5 seconds
    Revoke(RevokeArgs),
    /// Rename a node
    Rename(RenameArgs),
    /// Demonstrate a network of processes: ask, kill the worker that answered, ask again
    Demo,
    /// Kill, freeze and cut off the processes of a private network while clients ask it, and count what went wrong
    Drill(DrillArgs),
    /// Ask a model one question and print the answer
    Run(RunArgs),
    /// Chat with a model; piped input is sent line by line
    Chat(ChatArgs),
    /// Add, list, load, alias and remove models
    #[command(subcommand)]
    Model(ModelCommand),
    /// Create, list and revoke API keys
    #[command(subcommand)]
    Token(TokenCommand),
    /// List the models of the network (same as `model list`)
    #[command(visible_alias = "ls")]
    List(ServerArgs),
    /// List the nodes of the network and their state
    #[command(visible_alias = "ps")]
    Nodes(NodesArgs),
    /// List, show and cancel jobs
    #[command(subcommand)]
    Jobs(JobsCommand),
    /// List the requests that wait for a free slot, and why
    Queue(QueueArgs),
    /// Explain where a request ran and why: workers, scores, attempts and how they ended
    Explain(RequestArgs),
    /// List, show, replay and delete dead letters: failed jobs that are kept with their requests
    #[command(subcommand)]
    Dlq(DlqCommand),
    /// List, show and cancel batches
    #[command(subcommand)]
    Batch(BatchCommand),
    /// Show, set, list and explain what tenants may do
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Show what tenants use of their quotas, what is left, and when it resets
    Quota(QuotaArgs),
    /// Diagnose problems and suggest what to do
    Doctor(ServerArgs),
    /// Show or check the settings
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Print a shell completion script
    Completions {
        /// Shell to complete in
        shell: clap_complete::Shell,
    },
    /// Write the manual pages into a folder
    Man {
        /// The folder; created if it does not exist
        folder: PathBuf,
    },
    /// Hold one model, for a worker
    #[command(hide = true)]
    EngineHost,
}

/// Where the running network is.
#[derive(Debug, Clone, Default, Args)]
pub struct ServerArgs {
    /// Address of the gateway [default: the gateway of this data folder]
    #[arg(long, value_name = "URL", env = "TETHER_URL")]
    pub url: Option<String>,
    /// File with the API key [default: the key of this data folder]
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// PEM file with the gateway's certificate or its authority [default: the system's authorities]. Not needed for the
    /// gateway of this data folder
    #[arg(long, value_name = "FILE", env = "TETHER_CA")]
    pub ca: Option<PathBuf>,
}

/// How to run the network.
#[derive(Debug, Clone, Default, Args)]
pub struct UpArgs {
    /// Address to serve HTTP on
    #[arg(long, value_name = "HOST:PORT")]
    pub bind: Option<String>,
    /// UDP address on which other machines may join with `tether join`
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub listen: Option<String>,
    /// Name of this region
    #[arg(long, value_name = "REGION")]
    pub region: Option<String>,
    /// Number of workers
    #[arg(long, value_name = "COUNT")]
    pub workers: Option<u32>,
    /// What else its workers serve
    #[command(flatten)]
    pub models: ModelFilesArgs,
    /// What else its workers offer
    #[command(flatten)]
    pub adopt: AdoptArgs,
    /// Ends when the process that started it does
    #[arg(long, hide = true)]
    pub with_parent: bool,
}

/// Which files to serve.
#[derive(Debug, Clone, Default, Args)]
pub struct ModelFilesArgs {
    /// GGUF files to serve besides the configured models; NAME=FILE sets the model name. `up` also takes URLs and
    /// models of the Hugging Face Hub (hf:ORG/REPO[:QUANT]), which it adds permanently
    #[arg(value_name = "[NAME=]FILE")]
    pub files: Vec<String>,
}

/// Which servers to adopt.
#[derive(Debug, Clone, Default, Args)]
pub struct AdoptArgs {
    /// Also serve the models of running servers (vLLM, SGLang, llama-server, Ollama, LM Studio); without a URL, of
    /// those found on this machine
    #[arg(long, value_name = "URL,...", value_delimiter = ',', num_args = 0..=1)]
    pub adopt: Option<Vec<String>>,
}

/// How to run jobs.
#[derive(Debug, Clone, Default, Args)]
pub struct WorkerArgs {
    /// How it reaches the others
    #[command(flatten)]
    pub node: NodeArgs,
    /// What else it serves
    #[command(flatten)]
    pub models: ModelFilesArgs,
    /// What else it offers
    #[command(flatten)]
    pub adopt: AdoptArgs,
}

/// How a node reaches the others.
#[derive(Debug, Clone, Default, Args)]
pub struct NodeArgs {
    /// Bootstrap nodes of the network
    #[arg(long, value_name = "HOST:PORT,...", value_delimiter = ',')]
    pub bootstrap: Option<Vec<String>>,
    /// Name of this region
    #[arg(long, value_name = "REGION")]
    pub region: Option<String>,
    /// UDP address to listen on; port 0 picks a free port
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub listen: Option<String>,
    /// HTTP address to serve this service's Prometheus metrics on
    #[arg(long, value_name = "HOST:PORT")]
    pub metrics_listen: Option<String>,
    /// File with milliseconds that are added to the clock, for `tether drill`
    #[arg(long, value_name = "FILE", hide = true, requires = "with_parent")]
    pub clock_file: Option<PathBuf>,
    /// Ends when the process that started it does
    #[arg(long, hide = true)]
    pub with_parent: bool,
}

/// How to restart the services.
#[derive(Debug, Clone, Default, Args)]
pub struct StartArgs {
    /// Ends when the process that started it does
    #[arg(long, hide = true)]
    pub with_parent: bool,
}

/// How to place jobs.
#[derive(Debug, Clone, Default, Args)]
pub struct OrchestratorArgs {
    /// How it reaches the others
    #[command(flatten)]
    pub node: NodeArgs,
    /// Other regions whose workers may be used
    #[arg(long, value_name = "REGION,...", value_delimiter = ',')]
    pub near_regions: Option<Vec<String>>,
}

/// How to accept requests.
#[derive(Debug, Clone, Default, Args)]
pub struct GatewayArgs {
    /// How it reaches the others
    #[command(flatten)]
    pub node: NodeArgs,
    /// Address to serve HTTP on
    #[arg(long, value_name = "HOST:PORT")]
    pub bind: Option<String>,
}

/// What to break, and how often.
#[derive(Debug, Clone, Default, Args)]
pub struct DrillArgs {
    /// Run only the cells whose names begin with this, such as kill, kill/worker or freeze/gateway/5s; may be repeated
    #[arg(long = "campaign", value_name = "NAME")]
    pub campaigns: Vec<String>,
    /// Kills of each cell. Slower injuries run once for every ten of them, at least once
    #[arg(long, value_name = "COUNT", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub kills: u32,
    /// Seed of the random choices; a failing cell prints it [default: a new one]
    #[arg(long, value_name = "NUMBER")]
    pub seed: Option<u64>,
    /// GGUF file of the model to ask [default: tether-tiny]
    #[arg(long, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// Number of networks that are injured at the same time [default: one for each core, at most 4]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub networks: Option<u32>,
    /// List the cells without running them
    #[arg(long)]
    pub list: bool,
    /// Keep the folder with the data and logs of the networks
    #[arg(long)]
    pub keep: bool,
    /// Runs in namespaces of its own already
    #[arg(long, hide = true)]
    pub inside: bool,
    /// Ends when the process that started it does
    #[arg(long, hide = true)]
    pub with_parent: bool,
}

/// Which node to invite.
#[derive(Debug, Clone, Args)]
pub struct InviteArgs {
    /// Role of the new node
    #[arg(long, value_enum, value_name = "ROLE", default_value = "worker")]
    pub role: Role,
    /// Regions it may run in [default: any]
    #[arg(long, value_name = "REGION,...", value_delimiter = ',')]
    pub regions: Vec<String>,
    /// Name of the new node
    #[arg(long, default_value = "")]
    pub name: String,
    /// Where the network is
    #[command(flatten)]
    pub server: ServerArgs,
    /// Hours until the invite expires
    #[arg(long, value_name = "HOURS", default_value_t = 24, value_parser = clap::value_parser!(u32).range(1..=24))]
    pub hours: u32,
}

fn keep_alive(text: &str) -> Result<i64, &'static str> {
    text.parse().map(|KeepAlive(secs)| secs)
}

/// What a node does in the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Role {
    /// Accepts requests.
    Gateway,
    /// Places jobs.
    Orchestrator,
    /// Runs jobs.
    Worker,
}

/// Which network to join.
#[derive(Debug, Clone, Args)]
pub struct JoinArgs {
    /// The invite, as `tether invite` printed it; `-` reads it from stdin, so that no list of processes shows it
    #[arg(value_parser = invite_of)]
    pub invite: String,
    /// How this node reaches the others
    #[command(flatten)]
    pub node: NodeArgs,
    /// Address to serve HTTP on (gateways)
    #[arg(long, value_name = "HOST:PORT")]
    pub bind: Option<String>,
    /// What else it serves (workers)
    #[command(flatten)]
    pub models: ModelFilesArgs,
    /// What else it offers (workers)
    #[command(flatten)]
    pub adopt: AdoptArgs,
    /// Other regions whose workers may be used (orchestrators)
    #[arg(long, value_name = "REGION,...", value_delimiter = ',')]
    pub near_regions: Option<Vec<String>>,
    /// Enrol without starting the service; `tether start` starts it
    #[arg(long)]
    pub only_enrol: bool,
}

/// Which node to revoke.
#[derive(Debug, Clone, Args)]
pub struct RevokeArgs {
    /// Name of the node, its key, or the first digits of its key (see `tether nodes`)
    pub node: String,
    /// Where the network is
    #[command(flatten)]
    pub server: ServerArgs,
}

/// Which node to rename.
#[derive(Debug, Clone, Args)]
pub struct RenameArgs {
    /// Name of the node, its key, or the first digits of its key (see `tether nodes`)
    pub node: String,
    /// New name
    pub name: String,
    /// Where the network is
    #[command(flatten)]
    pub server: ServerArgs,
}

/// Which nodes to list, and for how long.
#[derive(Debug, Clone, Default, Args)]
pub struct NodesArgs {
    /// Where the network is
    #[command(flatten)]
    pub server: ServerArgs,
    /// Follow changes until Ctrl-C
    #[arg(long, conflicts_with = "json")]
    pub watch: bool,
}

/// Lists, shows and cancels jobs.
#[derive(Debug, Subcommand)]
pub enum JobsCommand {
    /// List running and settled jobs, the newest first
    #[command(visible_alias = "ls")]
    List(JobsListArgs),
    /// Show the jobs of a request with their attempts
    Show(RequestArgs),
    /// Cancel the running jobs of a request; its client gets an error, and what it has read is billed
    Cancel(RequestArgs),
}

/// Which jobs to list.
#[derive(Debug, Clone, Args)]
pub struct JobsListArgs {
    /// Only jobs in this state: running, completed, failed, cancelled or dead
    #[arg(long, value_name = "STATE")]
    pub state: Option<JobStatus>,
    /// Only jobs of this tenant
    #[arg(long, value_name = "TENANT")]
    pub tenant: Option<TenantId>,
    /// Only jobs of this model, in any version
    #[arg(long, value_name = "NAME")]
    pub model: Option<ModelName>,
    /// Maximum number of jobs
    #[arg(long, value_name = "COUNT", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub limit: u32,
    /// Where the network is
    #[command(flatten)]
    pub server: ServerArgs,
}

/// Which waiting requests to list.
#[derive(Debug, Clone, Args)]
pub struct QueueArgs {
    /// Maximum number of requests
    #[arg(long, value_name = "COUNT", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pub limit: u32,
    /// Where the network is
    #[command(flatten)]
    pub server: ServerArgs,
}

#[derive(Debug, Clone, Args)]
pub struct RequestArgs {
    /// Id of the request: the header x-request-id of its response, or the id in its answer
    pub request: String,
    /// Where the network is
    #[command(flatten)]
    pub server: ServerArgs,
}

/// Shows, sets, lists and explains policies.
#[derive(Debug, Subcommand)]
pub enum PolicyCommand {
    /// List the tenants that have a policy
    #[command(visible_alias = "ls")]
    List(ServerArgs),
    /// Show the rules of a tenant
    Show(PolicyShowArgs),
    /// Set or clear rules of a tenant; others stay. They apply within 2 seconds
    ///
    /// If two commands change the same tenant at the same time, the last one wins, and the changes of the other may be
    /// lost.
    Set(Box<PolicySetArgs>),
    /// Show which rules apply to a request of a tenant now, what each says, and what would happen
    Explain(PolicyExplainArgs),
}

/// Whose policy to show.
#[derive(Debug, Clone, Args)]
pub struct PolicyShowArgs {
    /// Name of the tenant
    pub tenant: TenantId,
    /// Where the network is
    #[command(flatten)]
    pub server: ServerArgs,
}

/// The rules to change. A limit of 0 allows nothing.
#[derive(Debug, Clone, Args)]
pub struct PolicySetArgs {
    /// Name of the tenant
    pub tenant: TenantId,
    /// Maximum requests per minute in the long run
    #[arg(long, value_name = "COUNT")]
    pub requests_per_minute: Option<u32>,
    /// Maximum requests in each day of UTC
    #[arg(long, value_name = "COUNT")]
    pub requests_per_day: Option<u64>,
    /// Maximum tokens of prompts and answers in each minute
    #[arg(long, value_name = "COUNT")]
    pub tokens_per_minute: Option<u64>,
    /// Maximum tokens of prompts and answers in each day of UTC
    #[arg(long, value_name = "COUNT")]
    pub tokens_per_day: Option<u64>,
    /// Maximum jobs that run or wait at the same time
    #[arg(long, value_name = "COUNT")]
    pub concurrent_jobs: Option<u32>,
    /// The models that the tenant may use, separated by commas; replaces the list
    #[arg(long = "allow-model", value_name = "MODEL", value_delimiter = ',')]
    pub allow_models: Option<Vec<ModelName>>,
    /// The regions in which the tenant's jobs may run, separated by commas; replaces the list
    #[arg(long = "allow-region", value_name = "REGION", value_delimiter = ',')]
    pub allow_regions: Option<Vec<Region>>,
    /// The classes that the tenant may ask for: interactive, standard, batch; replaces the list
    #[arg(long = "allow-class", value_name = "CLASS", value_delimiter = ',', value_parser = service_class)]
    pub allow_classes: Option<Vec<ServiceClass>>,
    /// Share of capacity while others wait too, relative to their shares
    #[arg(long, value_name = "WEIGHT", value_parser = clap::value_parser!(u32).range(1..))]
    pub weight: Option<u32>,
    /// The models to use instead while capacity is short, the best first, separated by commas
    #[arg(long = "degrade-model", value_name = "MODEL", value_delimiter = ',')]
    pub degrade_models: Option<Vec<ModelName>>,
    /// The adapter to use instead while capacity is short
    #[arg(long, value_name = "ADAPTER")]
    pub degrade_adapter: Option<AdapterName>,
    /// Maximum tokens of an answer while capacity is short
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    pub degrade_max_tokens: Option<u32>,
    /// Rules to remove
    #[arg(long, value_name = "RULE")]
    pub clear: Vec<PolicyRule>,
    /// JSON file with the whole policy, as `tether policy show --json` prints it; - reads stdin
    #[arg(long, value_name = "FILE")]
    pub from_file: Option<PathBuf>,
    /// Where the network is
    #[command(flatten)]
    pub server: ServerArgs,
}

/// A rule of a policy that can be removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PolicyRule {
    /// Every rule
    All,
    RequestsPerMinute,
    RequestsPerDay,
    TokensPerMinute,
    TokensPerDay,
    ConcurrentJobs,
    AllowModel,
    AllowRegion,
    AllowClass,
    Weight,
    Degrade,
}

/// A request to explain.
#[derive(Debug, Clone, Args)]
pub struct PolicyExplainArgs {
    /// Name of the tenant
    pub tenant: TenantId,
    /// Model of the request
    #[arg(long, value_name = "MODEL")]
    pub model: Option<ModelName>,
    /// Class of the request: interactive, standard or batch
    #[arg(long, value_name = "CLASS", default_value = "standard", value_parser = service_class)]
    pub class: ServiceClass,
    /// The most tokens that the request may need: its prompt and max_tokens
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    pub tokens: u64,
    /// Where the network is
    #[command(flatten)]
    pub server: ServerArgs,
}

/// Whose quotas to show.
#[derive(Debug, Clone, Args)]
pub struct QuotaArgs {
    /// Name of the tenant [default: all that have used something today, at most 1,000 for each orchestrator]
    pub tenant: Option<TenantId>,
    /// Where the network is
    #[command(flatten)]
    pub server: ServerArgs,
}

fn service_class(text: &str) -> Result<ServiceClass, String> {
    let named = ServiceClass::ALL.into_iter().find(|class| class.as_str() == text);
    named.ok_or_else(|| "the classes are interactive, standard and batch".to_owned())
}

/// Lists, shows, replays and deletes dead letters.
#[derive(Debug, Subcommand)]
pub enum DlqCommand {
    /// List dead letters, the newest first
    #[command(visible_alias = "ls")]
    List(DlqListArgs),
    /// Show a dead letter: its cause, its attempts and, on demand, its request
    Show(DlqShowArgs),
    /// Run the request of a dead letter again and print how it ended; it is billed to its tenant
    Replay(DlqReplayArgs),
    /// Delete dead letters
    #[command(visible_alias = "rm")]
    Purge(DlqPurgeArgs),
}

/// What to do with batches. They are those of the API key's tenant.
#[derive(Debug, Clone, Subcommand)]
pub enum BatchCommand {
    /// List batches, the newest first
    #[command(visible_alias = "ls")]
    List(BatchListArgs),
    /// Show a batch: where it stands, and its files
    Show(BatchRefArgs),
    /// Cancel a batch; the answers that it has are kept
    Cancel(BatchRefArgs),
}

/// Which batches to list.
#[derive(Debug, Clone, Args)]
pub struct BatchListArgs {
    /// Maximum number of batches
    #[arg(long, value_name = "COUNT", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub limit: u32,
    /// Where the network is
    #[command(flatten)]
    pub server: ServerArgs,
}

/// The batch to show or cancel.
#[derive(Debug, Clone, Args)]
pub struct BatchRefArgs {
    /// Id of the batch, as `tether batch list` shows it
    pub batch: BatchId,
    /// Where the network is
    #[command(flatten)]
    pub server: ServerArgs,
}

/// Which dead letters to list.
#[derive(Debug, Clone, Args)]
pub struct DlqListArgs {
    /// Only letters of this tenant
    #[arg(long, value_name = "TENANT")]
    pub tenant: Option<TenantId>,
    /// Only letters of this model, in any version
    #[arg(long, value_name = "NAME")]
    pub model: Option<ModelName>,
    /// Maximum number of letters
    #[arg(long, value_name = "COUNT", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub limit: u32,
    /// Where the network is
    #[command(flatten)]
    pub server: ServerArgs,
}

/// Which dead letter to show.
#[derive(Debug, Clone, Args)]
pub struct DlqShowArgs {
    /// Id of the request, as `tether dlq list` shows it
    pub request: String,
    /// Also print the request, with its prompt
    #[arg(long)]
    pub payload: bool,
    /// Where the network is
    #[command(flatten)]
    pub server: ServerArgs,
}

/// Which dead letter to run again.
#[derive(Debug, Clone, Args)]
pub struct DlqReplayArgs {
    /// Id of the request, as `tether dlq list` shows it
    pub request: String,
    /// Keep the dead letter even if the request completes
    #[arg(long)]
    pub keep: bool,
    /// Where the network is
    #[command(flatten)]
    pub server: ServerArgs,
}

/// Which dead letters to delete.
#[derive(Debug, Clone, Args)]
pub struct DlqPurgeArgs {
    /// Ids of the requests, as `tether dlq list` shows them
    #[arg(value_name = "REQUEST")]
    pub requests: Vec<String>,
    /// Delete the letters of jobs that died more than so many days ago
    #[arg(long, value_name = "DAYS", conflicts_with = "requests", value_parser = clap::value_parser!(u32).range(0..=36_500))]
    pub older_than: Option<u32>,
    /// Delete every letter
    #[arg(long, conflicts_with_all = ["requests", "older_than"])]
    pub all: bool,
    /// Do not ask before deleting every letter
    #[arg(long)]
    pub yes: bool,
    /// Where the network is
    #[command(flatten)]
    pub server: ServerArgs,
}

/// Which model to ask, and what.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// Model as name[@MAJOR.MINOR][:adapter], or a GGUF file, [NAME=]FILE, or a URL, or a model of the Hugging Face
    /// Hub, hf:ORG/REPO[:QUANT]
    pub model: String,
    /// The prompt; - reads it from stdin. Piped input is appended to it
    pub prompt: Option<String>,
    /// System prompt
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Seconds to wait while the model is loaded
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub timeout: u64,
    /// Maximum number of tokens to generate
    #[arg(long, value_name = "COUNT")]
    pub max_tokens: Option<u32>,
    /// Sampling temperature; 0 always takes the most likely token
    #[arg(long, value_name = "NUMBER")]
    pub temperature: Option<f32>,
    /// Sampling seed; the same seed gives the same answer
    #[arg(long, value_name = "NUMBER")]
    pub seed: Option<u64>,
    /// Print statistics after the answer: tokens, tokens per second, load time
    #[arg(long)]
    pub verbose: bool,
    /// Where the network is
    #[command(flatten)]
    pub server: ServerArgs,
}

/// Which model to chat with.
#[derive(Debug, Clone, Args)]
pub struct ChatArgs {
    /// Model as name[@MAJOR.MINOR][:adapter], or a GGUF file, [NAME=]FILE, or a URL, or hf:ORG/REPO[:QUANT] [default:
    /// the served model, or a choice if there are several]
    pub model: Option<String>,
    /// System prompt
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Seconds to wait while the model is loaded
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub timeout: u64,
    /// Where the network is
    #[command(flatten)]
    pub server: ServerArgs,
}

/// Adds, lists, loads, aliases and removes models.
#[derive(Debug, Subcommand)]
pub enum ModelCommand {
    /// Add a model from a file, a URL, the Hugging Face Hub or another program
    #[command(visible_alias = "pull", disable_version_flag = true)]
    Add(ModelAddArgs),
    /// List the models of the network with their state, nodes and aliases
    #[command(visible_alias = "ls")]
    List(ServerArgs),
    /// Show the details of a model
    Show {
        /// Model as name[@MAJOR.MINOR], or an alias
        model: String,
        /// Where the network is
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Remove a model, and its file unless something else uses it
    Rm {
        /// Model as name[@MAJOR.MINOR]
        model: String,
        /// Also if a worker has it in memory or aliases point to it; those aliases are removed
        #[arg(long)]
        force: bool,
        /// Where the network is
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Load a model into the memory of its workers and wait until it is ready
    Load {
        /// Model as name[@MAJOR.MINOR], or an alias
        model: String,
        /// How long it stays in memory when idle, on every worker: seconds, 10m, -1 for ever, 0 to unload it
        #[arg(long, value_name = "TIME", value_parser = keep_alive, allow_hyphen_values = true)]
        keep_alive: Option<i64>,
        /// Where the network is
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Unload a model from memory, unless jobs are running; the next request loads it again
    Unload {
        /// Model as name[@MAJOR.MINOR], or an alias
        model: String,
        /// Where the network is
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Keep a model in memory on every worker that may serve it, also after restarts
    Pin {
        /// Model as name[@MAJOR.MINOR], or an alias
        model: String,
        /// Where the network is
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Undo `pin`: the model is unloaded when idle again
    Unpin {
        /// Model as name[@MAJOR.MINOR], or an alias
        model: String,
        /// Where the network is
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Give a model another name, such as gpt-4o-mini, or several models one name; effective within 5 seconds
    Alias(ModelAliasArgs),
    /// Add, list and remove LoRA adapters
    #[command(subcommand)]
    Adapter(AdapterCommand),
}

/// A model to add.
#[derive(Debug, Clone, Args)]
pub struct ModelAddArgs {
    /// GGUF files or URLs (of a split model, the first part), or models of the Hugging Face Hub, hf:ORG/REPO[:QUANT]
    #[arg(value_name = "FILE|URL|hf:ORG/REPO[:QUANT]", required_unless_present = "from")]
    pub sources: Vec<String>,
    /// Add models that another program keeps on this machine, by its names for them; without a name, list them
    #[arg(long, value_name = "ollama|lmstudio|huggingface|FOLDER")]
    pub from: Option<String>,
    /// Name of the model [default: made from the file name]
    #[arg(long)]
    pub name: Option<String>,
    /// Version as MAJOR.MINOR [default: 1.0]
    #[arg(long, value_name = "MAJOR.MINOR")]
    pub version: Option<String>,
    /// Description, one line
    #[arg(long)]
    pub description: Option<String>,
    /// Allow downloads over plain HTTP from other machines
    #[arg(long)]
    pub insecure: bool,
    /// Where the network is
    #[command(flatten)]
    pub server: ServerArgs,
}

/// An alias of one or several models.
#[derive(Debug, Clone, Args)]
pub struct ModelAliasArgs {
    /// The alias
    pub alias: String,
    /// Its target, name[@MAJOR.MINOR][:adapter]. With several targets, each request goes to one that supports it and
    /// has capacity
    #[arg(value_name = "MODEL", required_unless_present = "rm", conflicts_with = "rm")]
    pub targets: Vec<String>,
    /// Remove the alias
    #[arg(long)]
    pub rm: bool,
    /// Where the network is
    #[command(flatten)]
    pub server: ServerArgs,
}

/// Adds, lists and removes adapters.
#[derive(Debug, Subcommand)]
pub enum AdapterCommand {
    /// Add an adapter from a GGUF file
    Add(AdapterAddArgs),
    /// List the adapters of the network
    #[command(visible_alias = "ls")]
    List(ServerArgs),
    /// Remove an adapter; effective within 5 seconds
    Rm {
        /// Model as name[@MAJOR.MINOR]
        model: String,
        /// Name of the adapter
        name: String,
        /// Where the network is
        #[command(flatten)]
        server: ServerArgs,
    },
}

/// An adapter to add.
#[derive(Debug, Clone, Args)]
pub struct AdapterAddArgs {
    /// Model as name[@MAJOR.MINOR]
    pub model: String,
    /// Name of the adapter; clients ask for model:name
    pub name: String,
    /// GGUF file of the adapter
    pub file: PathBuf,
    /// Description, one line
    #[arg(long, default_value = "")]
    pub description: String,
    /// Where the network is
    #[command(flatten)]
    pub server: ServerArgs,
}

/// Creates, lists and revokes API keys.
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Create a key; the secret is shown only once
    Create(TokenCreateArgs),
    /// List the keys, without their secrets
    #[command(visible_alias = "ls")]
    List(ServerArgs),
    /// Revoke a key; it stops working within 5 seconds
    Revoke(TokenRevokeArgs),
}

/// A key to revoke.
#[derive(Debug, Clone, Args)]
pub struct TokenRevokeArgs {
    /// Id of the key: the eight characters after tth_live_
    pub key_id: String,
    /// Do not ask before revoking the last admin key
    #[arg(long)]
    pub yes: bool,
    /// Where the network is
    #[command(flatten)]
    pub server: ServerArgs,
}

/// A key to create.
#[derive(Debug, Clone, Args)]
pub struct TokenCreateArgs {
    /// Tenant that the key belongs to
    #[arg(long, default_value = "default")]
    pub tenant: String,
    /// Name of the key
    #[arg(long, default_value = "")]
    pub name: String,
    /// Make it an admin key, which may also operate the network
    #[arg(long)]
    pub admin: bool,
    /// Days until the key expires
    #[arg(long, value_name = "DAYS", value_parser = clap::value_parser!(u32).range(1..=36_500))]
    pub expires_days: Option<u32>,
    /// Requests per minute of the tenant; 0 removes the limit
    #[arg(long, value_name = "COUNT")]
    pub requests_per_minute: Option<u32>,
    /// Where the network is
    #[command(flatten)]
    pub server: ServerArgs,
}

/// Shows or checks the settings.
#[derive(Debug, Clone, Copy, Subcommand)]
pub enum ConfigCommand {
    /// Print a settings file with every default
    Example,
    /// Check the settings and print the effective ones
    Check,
}

/// Returns an invite from the command line, or the first line of stdin for `-`.
fn invite_of(text: &str) -> Result<String, String> {
    if text != "-" {
        return Ok(text.to_owned());
    }
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line).map_err(|error| format!("stdin cannot be read: {error}"))?;
    if line.trim().is_empty() { Err("stdin has no invite".to_owned()) } else { Ok(line.trim().to_owned()) }
}
