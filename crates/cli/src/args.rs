//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use protocol::keep_alive::KeepAlive;

/// Dependable AI inference over scattered machines, behind one OpenAI-compatible address.
#[derive(Debug, Parser)]
#[command(name = "tether", version, arg_required_else_help = true, propagate_version = true, max_term_width = 100)]
pub struct Cli {
    /// What is the same for all commands.
    #[command(flatten)]
    pub common: Common,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What is the same for all commands.
#[derive(Debug, Clone, Default, Args)]
pub struct Common {
    /// Settings file; by default tether.toml in the configuration folder
    #[arg(long, global = true, value_name = "FILE", env = "TETHER_CONFIG")]
    pub config: Option<PathBuf>,
    /// Folder for keys, stores and models
    #[arg(long, global = true, value_name = "FOLDER")]
    pub data_dir: Option<PathBuf>,
    /// How logs are written
    #[arg(long, global = true, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
    /// Print JSON where the command reads something
    #[arg(long, global = true)]
    pub json: bool,
}

/// How logs are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Pretty,
    /// One JSON object a line.
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

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the whole network in one process
    #[command(visible_alias = "serve")]
    Up(UpArgs),
    /// Help nodes to find each other
    Bootstrap(NodeArgs),
    /// Keep models, API keys and the list of who belongs to the network
    Registry(NodeArgs),
    /// Place jobs on workers
    Orchestrator(OrchestratorArgs),
    /// Take requests over HTTP and from peers
    Gateway(GatewayArgs),
    /// Run jobs
    Worker(WorkerArgs),
    /// Start again every service that was started or joined in this data folder, with the flags it had
    Start(StartArgs),
    /// Make an invite: the one line with which another machine joins
    Invite(InviteArgs),
    /// Join a network by an invite, and do what it invites to
    Join(JoinArgs),
    /// Take a node out of the network; it gets no work within 5 seconds
    Revoke(RevokeArgs),
    /// Give a node another name
    Rename(RenameArgs),
    /// Show a network of processes at work: ask, kill the worker that answered, ask again
    Demo,
    /// Ask a model and print its answer
    Run(RunArgs),
    /// Talk with a model; what is piped in is said line by line
    Chat(ChatArgs),
    /// Add models, look at them, name and forget them
    #[command(subcommand)]
    Model(ModelCommand),
    /// Make, list and revoke API keys
    #[command(subcommand)]
    Token(TokenCommand),
    /// List the models of the network, as `model list` does
    #[command(visible_alias = "ls")]
    List(ServerArgs),
    /// List the nodes of the network: what they do, and how they are
    #[command(visible_alias = "ps")]
    Nodes(NodesArgs),
    /// Say what is wrong, and what to do about it
    Doctor(ServerArgs),
    /// Look at the settings
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Print what completes commands in a shell: source it, or put it where the shell looks
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages into a folder
    Man {
        /// The folder; it is made where it is missing
        folder: PathBuf,
    },
    /// Hold one model, for a worker
    #[command(hide = true)]
    EngineHost,
}

/// Where the running network is.
#[derive(Debug, Clone, Default, Args)]
pub struct ServerArgs {
    /// Address of the gateway; by default the one of this data folder
    #[arg(long, value_name = "URL", env = "TETHER_URL")]
    pub url: Option<String>,
    /// File that holds the API key; by default the one of this data folder
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// PEM file of the authority that issued the gateway's certificate, or of that certificate; by default
    /// the system's authorities. The gateway of this data folder needs none
    #[arg(long, value_name = "FILE", env = "TETHER_CA")]
    pub ca: Option<PathBuf>,
}

/// How to run the network.
#[derive(Debug, Clone, Default, Args)]
pub struct UpArgs {
    /// Address to serve HTTP on
    #[arg(long, value_name = "HOST:PORT")]
    pub bind: Option<String>,
    /// UDP address at which other machines may join with `tether join`
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub listen: Option<String>,
    /// Name of this region
    #[arg(long, value_name = "REGION")]
    pub region: Option<String>,
    /// Workers to run
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
    /// GGUF files to serve besides the configured models; NAME=FILE chooses the name that clients use. `up` also takes
    /// URLs and models of the Hugging Face Hub (hf:ORG/REPO[:QUANT]), which it adds for good
    #[arg(value_name = "[NAME=]FILE")]
    pub files: Vec<String>,
}

/// Which servers to adopt.
#[derive(Debug, Clone, Default, Args)]
pub struct AdoptArgs {
    /// Offer the models of servers that run already, too (vLLM, SGLang, llama-server, Ollama, LM Studio); without
    /// a URL, of those found on this machine
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
    /// Nodes that every node knows: where to look for others
    #[arg(long, value_name = "HOST:PORT,...", value_delimiter = ',')]
    pub bootstrap: Option<Vec<String>>,
    /// Name of this region
    #[arg(long, value_name = "REGION")]
    pub region: Option<String>,
    /// UDP address to listen on; port 0 takes a free one
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub listen: Option<String>,
    /// HTTP address at which to show this service's metrics
    #[arg(long, value_name = "HOST:PORT")]
    pub metrics_listen: Option<String>,
    /// Ends when the process that started it does
    #[arg(long, hide = true)]
    pub with_parent: bool,
}

/// How to start again.
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
    /// Other regions whose workers it uses
    #[arg(long, value_name = "REGION,...", value_delimiter = ',')]
    pub near_regions: Option<Vec<String>>,
}

/// How to take requests.
#[derive(Debug, Clone, Default, Args)]
pub struct GatewayArgs {
    /// How it reaches the others
    #[command(flatten)]
    pub node: NodeArgs,
    /// Address to serve HTTP on
    #[arg(long, value_name = "HOST:PORT")]
    pub bind: Option<String>,
}

/// Whom to invite.
#[derive(Debug, Clone, Args)]
pub struct InviteArgs {
    /// What the new node may do
    #[arg(long, value_enum, value_name = "ROLE", default_value = "worker")]
    pub role: Role,
    /// Regions it may stand in; by default any
    #[arg(long, value_name = "REGION,...", value_delimiter = ',')]
    pub regions: Vec<String>,
    /// Who it is for
    #[arg(long, default_value = "")]
    pub name: String,
    /// Where the network is
    #[command(flatten)]
    pub server: ServerArgs,
    /// Hours for which the invite holds
    #[arg(long, value_name = "HOURS", default_value_t = 24, value_parser = clap::value_parser!(u32).range(1..=24))]
    pub hours: u32,
}

fn keep_alive(text: &str) -> Result<i64, &'static str> {
    text.parse().map(|KeepAlive(secs)| secs)
}

/// What a node does in the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Role {
    /// Takes requests.
    Gateway,
    /// Places jobs.
    Orchestrator,
    /// Runs jobs.
    Worker,
}

/// Which network to join.
#[derive(Debug, Clone, Args)]
pub struct JoinArgs {
    /// The invite, as `tether invite` printed it
    pub invite: String,
    /// How this node reaches the others
    #[command(flatten)]
    pub node: NodeArgs,
    /// Address to serve HTTP on, where the invite is for a gateway
    #[arg(long, value_name = "HOST:PORT")]
    pub bind: Option<String>,
    /// What else it serves, where the invite is for a worker
    #[command(flatten)]
    pub models: ModelFilesArgs,
    /// What else it offers, where the invite is for a worker
    #[command(flatten)]
    pub adopt: AdoptArgs,
    /// Other regions whose workers it uses, where the invite is for an orchestrator
    #[arg(long, value_name = "REGION,...", value_delimiter = ',')]
    pub near_regions: Option<Vec<String>>,
    /// Only keep what the invite brings; `tether worker` then starts the node
    #[arg(long)]
    pub only_enrol: bool,
}

/// Whom to take out.
#[derive(Debug, Clone, Args)]
pub struct RevokeArgs {
    /// The node: its name, its key, or the beginning of its key, as `tether nodes` shows them
    pub node: String,
    /// Where the network is
    #[command(flatten)]
    pub server: ServerArgs,
}

/// What to call a node.
#[derive(Debug, Clone, Args)]
pub struct RenameArgs {
    /// The node: its name, its key, or the beginning of its key, as `tether nodes` shows them
    pub node: String,
    /// Its new name
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
    /// Go on showing them as they change, until Ctrl-C
    #[arg(long, conflicts_with = "json")]
    pub watch: bool,
}

/// What to ask.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// Model, as name[@MAJOR.MINOR][:adapter]; a GGUF file, as [NAME=]FILE; a URL of one, or a model of the Hugging
    /// Face Hub, as hf:ORG/REPO[:QUANT]
    pub model: String,
    /// What to ask; - reads it from stdin, and what is piped in is added to it
    pub prompt: Option<String>,
    /// What the model is told before: who it is, and how to answer
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Seconds to wait for a model that is being loaded
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub timeout: u64,
    /// The most tokens to generate
    #[arg(long, value_name = "COUNT")]
    pub max_tokens: Option<u32>,
    /// 0 takes the likeliest token each time
    #[arg(long, value_name = "NUMBER")]
    pub temperature: Option<f32>,
    /// The same seed gives the same answer
    #[arg(long, value_name = "NUMBER")]
    pub seed: Option<u64>,
    /// Say after the answer what it took: tokens, speed, and the time until the model was loaded
    #[arg(long)]
    pub verbose: bool,
    /// Where the network is
    #[command(flatten)]
    pub server: ServerArgs,
}

/// With whom to talk.
#[derive(Debug, Clone, Args)]
pub struct ChatArgs {
    /// Model, as name[@MAJOR.MINOR][:adapter], a GGUF file, as [NAME=]FILE, a URL or hf:ORG/REPO[:QUANT]; by default
    /// the one that is served, or a choice of them
    pub model: Option<String>,
    /// What the model is told before: who it is, and how to answer
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Seconds to wait for a model that is being loaded
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub timeout: u64,
    /// Where the network is
    #[command(flatten)]
    pub server: ServerArgs,
}

/// Adds models, looks at them, names and forgets them.
#[derive(Debug, Subcommand)]
pub enum ModelCommand {
    /// Take a model into this machine's store and register it; `tether up` then serves it
    #[command(visible_alias = "pull", disable_version_flag = true)]
    Add(ModelAddArgs),
    /// List the models of the network: how they are, where, and what else they are called
    #[command(visible_alias = "ls")]
    List(ServerArgs),
    /// Show all that is known of a model
    Show {
        /// Model, as name[@MAJOR.MINOR], or an alias
        model: String,
        /// Where the network is
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Forget a model, and delete its file where nothing else needs it
    Rm {
        /// Model, as name[@MAJOR.MINOR]
        model: String,
        /// Although a worker holds it or an alias stands for it, which is then forgotten, too
        #[arg(long)]
        force: bool,
        /// Where the network is
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Bring a model into the memory of the workers that serve it, and wait until it is there
    Load {
        /// Model, as name[@MAJOR.MINOR], or an alias
        model: String,
        /// How long it stays without work, from now on and on every worker: seconds, 10m, -1 for ever, or 0 to unload it
        #[arg(long, value_name = "TIME", value_parser = keep_alive, allow_hyphen_values = true)]
        keep_alive: Option<i64>,
        /// Where the network is
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Let a model leave the memory of its workers, unless jobs run on it; it is loaded again when it is asked for
    Unload {
        /// Model, as name[@MAJOR.MINOR], or an alias
        model: String,
        /// Where the network is
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Have every worker that may serve a model load it and keep it in memory, also after a restart
    Pin {
        /// Model, as name[@MAJOR.MINOR], or an alias
        model: String,
        /// Where the network is
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Let a pinned model leave the memory again when nobody uses it
    Unpin {
        /// Model, as name[@MAJOR.MINOR], or an alias
        model: String,
        /// Where the network is
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Give a model another name, such as gpt-4o-mini, or several models one name; it holds within 5 seconds
    Alias(ModelAliasArgs),
    /// Look at the LoRA adapters of models, add and forget them
    #[command(subcommand)]
    Adapter(AdapterCommand),
}

/// A model to add.
#[derive(Debug, Clone, Args)]
pub struct ModelAddArgs {
    /// GGUF files, where the first of several parts stands for all; URLs of them; or models of the Hugging Face
    /// Hub, as hf:ORG/REPO or hf:ORG/REPO:QUANT
    #[arg(value_name = "FILE|URL|hf:ORG/REPO[:QUANT]", required_unless_present = "from")]
    pub sources: Vec<String>,
    /// Take models that another program keeps on this machine, by its names for them; without a name, list them
    #[arg(long, value_name = "ollama|lmstudio|huggingface|FOLDER")]
    pub from: Option<String>,
    /// Name to ask for it by; by default made of the file's
    #[arg(long)]
    pub name: Option<String>,
    /// Version, as MAJOR.MINOR; by default 1.0
    #[arg(long, value_name = "MAJOR.MINOR")]
    pub version: Option<String>,
    /// One line about it
    #[arg(long)]
    pub description: Option<String>,
    /// Allow plain HTTP beyond this machine
    #[arg(long)]
    pub insecure: bool,
    /// Where the network is
    #[command(flatten)]
    pub server: ServerArgs,
}

/// Another name for a model, or one for several.
#[derive(Debug, Clone, Args)]
pub struct ModelAliasArgs {
    /// The name to give, or with --rm to forget
    pub alias: String,
    /// What it stands for, as name[@MAJOR.MINOR][:adapter]; of several models, each request goes to the one that can
    /// do what it asks and has room
    #[arg(value_name = "MODEL", required_unless_present = "rm", conflicts_with = "rm")]
    pub targets: Vec<String>,
    /// Forget the name
    #[arg(long)]
    pub rm: bool,
    /// Where the network is
    #[command(flatten)]
    pub server: ServerArgs,
}

/// Looks at adapters, adds and forgets them.
#[derive(Debug, Subcommand)]
pub enum AdapterCommand {
    /// Take an adapter into this machine's store and register it
    Add(AdapterAddArgs),
    /// List the adapters of the network
    #[command(visible_alias = "ls")]
    List(ServerArgs),
    /// Forget an adapter; requests for it are refused within 5 seconds
    Rm {
        /// Model, as name[@MAJOR.MINOR]
        model: String,
        /// The adapter's name
        name: String,
        /// Where the network is
        #[command(flatten)]
        server: ServerArgs,
    },
}

/// An adapter to add.
#[derive(Debug, Clone, Args)]
pub struct AdapterAddArgs {
    /// Model, as name[@MAJOR.MINOR]
    pub model: String,
    /// Name to ask for it by, as model:name
    pub name: String,
    /// The adapter, a GGUF file
    pub file: PathBuf,
    /// One line about it
    #[arg(long, default_value = "")]
    pub description: String,
    /// Where the network is
    #[command(flatten)]
    pub server: ServerArgs,
}

/// Makes, lists and revokes API keys.
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Make a key; it is shown this once
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
    /// The eight characters after tth_live_
    pub key_id: String,
    /// Revoke the last key that operates the network without a question
    #[arg(long)]
    pub yes: bool,
    /// Where the network is
    #[command(flatten)]
    pub server: ServerArgs,
}

/// A key to make.
#[derive(Debug, Clone, Args)]
pub struct TokenCreateArgs {
    /// Who pays
    #[arg(long, default_value = "default")]
    pub tenant: String,
    /// What the key is for
    #[arg(long, default_value = "")]
    pub name: String,
    /// Let the key operate the network too
    #[arg(long)]
    pub admin: bool,
    /// Days after which the key ends
    #[arg(long, value_name = "DAYS", value_parser = clap::value_parser!(u32).range(1..=36_500))]
    pub expires_days: Option<u32>,
    /// Requests the tenant may make a minute; 0 removes the limit
    #[arg(long, value_name = "COUNT")]
    pub requests_per_minute: Option<u32>,
    /// Where the network is
    #[command(flatten)]
    pub server: ServerArgs,
}

/// Looks at the settings.
#[derive(Debug, Clone, Copy, Subcommand)]
pub enum ConfigCommand {
    /// Print a settings file with every default
    Example,
    /// Check the settings and print what is in force
    Check,
}
